"""Which benches there are: those with a file in ``conf/bench``."""

from experiments.content import ROOT
from pbs.registry import Registry

# Those whose class is not ``experiments/benches/<name>.py``'s ``<Name>Bench``.
ELSEWHERE = {
    "coverage": "experiments.benches.coverage.bench:CoverageBench",
    "longbench": "experiments.benches.opencompass.longbench:LongBench",
    "longbench_v2": "experiments.benches.opencompass.longbench_v2:LongBenchV2",
    "opencompass": "experiments.benches.opencompass.by_name:OpenCompassDatasets",
    "ruler": "experiments.benches.opencompass.ruler:Ruler",
}


def class_of(name: str) -> str:
    """Where a bench's class is: "module:Class".

    The modules must be quick to import: heavy imports go into their functions.
    """
    words = "".join(part.capitalize() for part in name.split("_"))
    return ELSEWHERE.get(name, f"experiments.benches.{name}:{words}Bench")


_NAMES = sorted(path.stem for path in (ROOT / "conf" / "bench").glob("*.yaml"))
BENCHES = Registry("bench", {name: class_of(name) for name in _NAMES})
