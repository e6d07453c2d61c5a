"""The demo's table of README.md comes from the runs, not from whatever the last command showed."""

import pytest
import yaml

from experiments.report.runs import read_results
from experiments.tools import readme


@pytest.fixture
def demo(own_outputs):
    """The small needle runs as if their bench had been at its defaults."""
    for path in own_outputs.glob("needle/tiny/*/*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**config, "bench": {"name": "needle"}}))
    return own_outputs


def test_the_table_has_the_demos_runs_in_its_order(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = readme.needle_table(demo)
    methods = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert methods == ["| method", "| ---", "| flash", "| meanpool", "| pbs"]
    assert text.startswith("needle on tiny, 4 samples a method\n")
    assert (tmp_path / "docs" / "accuracy_density.png").stat().st_size > 5000
    assert (tmp_path / "docs" / "attention_map.png").stat().st_size > 5000


def test_without_the_demo_the_command_is_named(own_outputs):
    with pytest.raises(FileNotFoundError, match=r"flash, meanpool, pbs; run `make demo`"):
        readme.demo_runs(read_results(own_outputs))
