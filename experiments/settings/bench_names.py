"""Which benches there are."""

from pbs.registry import Registry

# One line per bench. The modules must be quick to import: heavy imports go into their functions.
BENCHES = Registry(
    "bench",
    {
        "needle": "experiments.benches.needle:NeedleBench",
        "attention": "experiments.benches.attention:AttentionBench",
        "coverage": "experiments.benches.coverage.bench:CoverageBench",
        "ttft": "experiments.benches.ttft:TtftBench",
        "longbench": "experiments.benches.opencompass.longbench:LongBench",
        "longbench_v2": "experiments.benches.opencompass.longbench_v2:LongBenchV2",
        "ruler": "experiments.benches.opencompass.ruler:Ruler",
    },
)
