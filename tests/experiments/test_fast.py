"""``debug=fast``: a size of every bench and every experiment that runs in seconds."""

import pytest
from omegaconf import OmegaConf

from experiments.run.runner import build_bench
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import CONF, RunConfig


@pytest.mark.parametrize("bench", BENCHES.names)
def test_fast_is_a_size_of_every_bench(compose_cell, bench):
    cfg = RunConfig.from_hydra(compose_cell(f"bench={bench}", "debug=fast", fast=False))
    assert (cfg.bench["name"], cfg.model_name) in {
        (bench, "tiny"),
        (bench, "generated_inputs"),
    }
    made = build_bench(cfg.bench)
    sizes = OmegaConf.to_container(OmegaConf.load(CONF / "debug/sizes/fast" / f"{bench}.yaml"))
    assert {key: getattr(made, key) for key in sizes} == sizes


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_can_be_fast(compose_cell, path):
    words = ["match.target=0.5"] if path.stem.startswith("matched") else []
    cell = compose_cell(f"experiment={path.stem}", "debug=fast", *words, fast=False)
    assert build_bench(RunConfig.from_hydra(cell).bench) is not None


@pytest.mark.parametrize("bench", ["attention", "coverage", "ttft", "ruler"])
def test_fast_runs_finish(command, bench):
    words = ("debug=fast", "check=false", "paths.outputs=out", "method=meanpool")
    status, printed = command(*words, f"bench={bench}")
    assert status == 0, printed
