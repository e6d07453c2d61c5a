import pytest
import torch

from pbs.ops import Geometry


def test_padding_mask_gives_starts_and_ends():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    geometry = Geometry.from_padding_mask(mask, num_queries=5)
    assert geometry.starts == (2, 0, 0, 0)
    assert geometry.ends == (5, 2, 5, 0)
    assert not geometry.is_unpadded
    spans = list(geometry.spans())
    assert ([0], slice(2, 5), slice(2, 5)) in spans
    assert ([1], slice(0, 2), slice(0, 2)) in spans
    assert len(spans) == 3  # the empty sequence has no span


def test_filled_cache_keeps_queries_last():
    geometry = Geometry.from_padding_mask(torch.tensor([[0, 1, 1, 1, 1, 1]]), num_queries=2)
    assert list(geometry.spans()) == [([0], slice(0, 2), slice(1, 6))]


def test_unwritten_cache_slots_are_not_seen():
    geometry = Geometry(2, 10, query_offset=3, starts=(0,), ends=(5,))
    assert list(geometry.spans()) == [([0], slice(0, 2), slice(0, 5))]
    assert not geometry.is_unpadded
    assert Geometry.unpadded(3, 2, 10).is_unpadded


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Geometry.from_padding_mask(torch.ones(3), num_queries=1), ValueError, "Z, Nk"),
        (
            lambda: Geometry.from_padding_mask(torch.tensor([[1, 0, 1]]), num_queries=3),
            NotImplementedError,
            "between real tokens",
        ),
        (lambda: Geometry(4, 3, 0, (0,), (3,)), ValueError, "must lie in the key slots"),
        (lambda: Geometry(3, 3, 0, (0, 1), (3,)), ValueError, "one start and one end"),
        (lambda: Geometry(3, 3, 0, (2,), (1,)), ValueError, "start <= end"),
    ],
)
def test_impossible_geometries_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
