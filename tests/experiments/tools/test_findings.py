"""The tables of docs/findings.md follow from the points and runs committed with them."""

import numpy as np
import pandas as pd
import pytest

from experiments.results import load
from experiments.statistics import compare_paired_values, student_interval
from experiments.tools.readme import README, RESULTS

TEXT = (README.parent / "docs" / "findings.md").read_text()
POINTS = RESULTS / "selection_2026-11-27" / "points.csv"
COLUMNS = ["kl", "kl_q1", "kl_q2", "kl_q3", "kl_q4"]
TARGET = 0.2


def rows():
    points = pd.read_csv(POINTS, keep_default_na=False)
    for (variant, settings), pair in points.groupby(["variant", "settings"], sort=False):
        first, last = (pair.iloc[place] for place in (0, -1))
        place = np.log(TARGET / first.density) / np.log(last.density / first.density)
        values = [first[c] * (last[c] / first[c]) ** place for c in COLUMNS]
        yield variant, settings, [f"{value:.4f}" for value in values]


@pytest.mark.parametrize(("variant", "settings", "values"), list(rows()))
def test_every_variant_stands_as_its_points_say(variant, settings, values):
    cells = f"`{settings}`" if settings else ""
    assert f"| {variant} | {cells} | {' | '.join(values)} |" in TEXT


def test_the_ten_windows_are_the_committed_runs():
    samples = {}
    for path in (RESULTS / "selection_2026-11-27" / "ten_windows").rglob("samples.jsonl"):
        samples[path.parts[-3]] = pd.read_json(path, lines=True, dtype={"sample_id": str})
    kl = {name: dict(zip(x.sample_id, x.kl, strict=True)) for name, x in samples.items()}
    gain = compare_paired_values(kl["pbs_calibrated"], kl["pbs"])
    paired = {
        "pbs": "",
        "pbs_calibrated": f"{gain.difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
    }
    for name, x in samples.items():
        interval = student_interval(list(x.kl))
        cells = [
            f"{100 * x.density.mean():.1f}",
            f"{x.kl.mean():.4f} [{interval.low:.4f}, {interval.high:.4f}]",
            paired[name],
            f"{x.nll_difference.mean():+.4f}",
            f"{100 * x.top1_same.mean():.1f}",
        ]
        assert len(x) == 10
        assert f"| `{name}` | {' | '.join(cells)} |" in TEXT
    runs = load(RESULTS / "selection_2026-11-27" / "ten_windows")
    assert set(runs.method) == {"pbs", "pbs_calibrated"}
    calibrated, published = samples["pbs_calibrated"], samples["pbs"]
    ours, theirs = ((x.kl.mean(), x.density.mean()) for x in (calibrated, published))
    said = f"{ours[0]:.4f} at density {ours[1]:.3f} where published PBS has "
    said += f"{theirs[0]:.4f} at {theirs[1]:.3f}"
    assert said in " ".join(README.read_text().split())
