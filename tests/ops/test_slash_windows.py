"""Windows and columns of vertical-slash heads: against a walk tile by tile, in both backends."""

import pytest
import torch

from pbs.ops.slash_windows import columns_outside, reference, walk_windows

WIDTH = 16
BACKENDS = ["reference", "triton"]


def make_table(num_rows, num_keys, generator):
    """Any table that never goes up, in shifted distances; those of no distance stay."""
    places = torch.arange(num_keys + 2 * WIDTH - 1)
    lower = places - torch.randint(1, 3 * WIDTH, (num_rows, len(places)), generator=generator)
    return torch.where(places < WIDTH, places, lower.clamp(min=0))


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    num_keys = 150
    ends = torch.arange(1, 11) * WIDTH
    table = make_table(3, num_keys, generator)
    expected = []
    for row in table.tolist():
        for end in ends.tolist():
            place, starts = end + WIDTH - 1, []
            while row[place] != place:
                place = row[place]
                starts.append(end - WIDTH - (place - (WIDTH - 1)))
            expected.append([start for start in starts if start < num_keys])
    return table, ends, num_keys, expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("most", [1, 1 << 21])
def test_windows_are_those_of_a_walk(case, backend, most, monkeypatch):
    monkeypatch.setattr(reference, "MAX_ELEMENTS", most)
    table, ends, num_keys, expected = case
    windows, counts = walk_windows(table, ends, width=WIDTH, num_keys=num_keys, backend=backend)
    assert windows.dtype == counts.dtype == torch.int32
    assert windows.shape[-1] >= max(map(len, expected))
    found = zip(windows.flatten(0, 1).tolist(), counts.flatten().tolist(), strict=True)
    assert [starts[:count] for starts, count in found] == expected
    slots = torch.arange(windows.shape[-1])
    assert not windows[slots >= counts[..., None]].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("most", [1, 1 << 21])
@pytest.mark.parametrize("num_chosen", [[40, 7, 0], [0, 0, 0]])
def test_columns_are_those_in_no_window_and_before_the_tile(
    case, backend, most, num_chosen, monkeypatch
):
    monkeypatch.setattr(reference, "MAX_ELEMENTS", most)
    table, ends, num_keys, starts = case
    windows, counts = walk_windows(table, ends, width=WIDTH, num_keys=num_keys)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(num_keys, generator=generator)[:40] for _ in "abc"])
    chosen, first = chosen.sort(dim=-1).values.int(), ends - WIDTH
    kept, num_kept = columns_outside(
        chosen, torch.tensor(num_chosen), windows, counts, first, width=WIDTH, backend=backend
    )
    for row in range(3):
        for tile in range(len(ends)):
            inside = {s + i for s in starts[row * len(ends) + tile] for i in range(WIDTH)}
            keys = chosen[row, : num_chosen[row]].tolist()
            expected = [key for key in keys if key not in inside and key < first[tile]]
            assert kept[row, tile, : num_kept[row, tile]].tolist() == expected
