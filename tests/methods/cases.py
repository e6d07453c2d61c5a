"""The test matrix of methods: one line per method, small tiles so that short inputs run sparse."""

from pbs import build_method

# name -> (method class name, parameters for the tests, parameters that must equal dense attention)
CASES = {
    "flash": ("flash", {}, {}),
    "meanpool": ("meanpool", {"block_size": 32, "threshold": 0.6}, {"threshold": 1.0}),
    "pbs": (
        "pbs",
        {"block_size": 32, "segment_size": 64, "threshold": 0.6},
        {"threshold": 1.0},
    ),
    "pbs-shared": (
        "pbs",
        {"block_size": 16, "segment_size": 64, "threshold": 0.6, "gqa": "shared"},
        {"threshold": 1},
    ),
    "pbs_plus": (
        "pbs_plus",
        {"block_size": 32, "segment_size": 64, "threshold": 0.6},
        {"threshold": 1.0},
    ),
    "pbs_plus-causal": (
        "pbs_plus",
        {"block_size": 32, "segment_size": 64, "threshold": 0.6, "normaliser": "causal"},
        {"threshold": 1.0},
    ),
    **{
        f"pbs-{selector}": (
            "pbs",
            {"block_size": 32, "segment_size": 64, "threshold": 0.6, "selector": selector},
            {"threshold": 1.0},
        )
        for selector in ("maxpool", "low_band", "oracle")
    },
    "xattention": (
        "xattention",
        {"block_size": 32, "threshold": 0.6},
        {"threshold": 1.0},
    ),
    "xattention-reference": (
        "xattention",
        {"block_size": 32, "stride": 16, "threshold": 0.6, "first_chunk": "reference"},
        {"threshold": 1.0},
    ),
    "flexprefill": ("flexprefill", {"block_size": 32, "gamma": 0.6}, {"gamma": 1.0}),
    "flexprefill-query-aware": (
        "flexprefill",
        {"block_size": 32, "gamma": 0.6, "tau": 1.0, "min_budget": 64},
        {"gamma": 1},
    ),
    "prism": ("prism", {"block_size": 32, "threshold": 0.6}, {"threshold": 1.0}),
    "pbs-none": (
        "pbs",
        {"block_size": 32, "segment_size": 32, "threshold": 0.5, "order": "none"},
        {"threshold": 1.0},
    ),
}


def build(case: str, *, densest: bool = False, **changes: object):
    name, params, dense = CASES[case]
    return build_method(name, **{**params, **(dense if densest else {}), **changes})
