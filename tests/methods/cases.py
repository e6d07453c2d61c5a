"""The test matrix of methods: one line per method, small tiles so that short inputs run sparse.

Few queries on a filled cache run sparse, too: no call of the matrix is a decoding step.
"""

from pbs import build_method
from pbs.orders import ORDERS
from pbs.selectors import SELECTORS

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
    "pbs_calibrated": (
        "pbs_calibrated",
        {"block_size": 32, "segment_size": 128, "threshold": 0.8},
        {"threshold": 1.0},
    ),
    **{
        f"pbs-local-{selector}": (
            "pbs",
            {
                "block_size": 16,
                "segment_size": 64,
                "threshold": 0.6,
                "selector": selector,
                "local_blocks": 1,
            },
            {"threshold": 1.0},
        )
        # Relative scores, credited ones, and one that takes both orders at once.
        for selector in ("meanpool", "antidiagonal", "sampled")
    },
    **{
        f"pbs-{selector}": (
            "pbs",
            {"block_size": 32, "segment_size": 64, "threshold": 0.6, "selector": selector},
            {"threshold": 1.0},
        )
        for selector in SELECTORS
        if selector != "meanpool"  # the default
    },
    "pbs-oracle-causal": (
        "pbs",
        {
            "block_size": 32,
            "segment_size": 64,
            "threshold": 0.9,
            "selector": "oracle",
            "selector_params": {"normaliser": "causal"},
        },
        {"threshold": 1.0},
    ),
    **{
        f"pbs-{order}": (
            "pbs",
            {"block_size": 32, "segment_size": 64, "threshold": 0.6, "order": order},
            {"threshold": 1.0},
        )
        for order in ORDERS
        if order not in ("last_block", "none")  # the default, and below
    },
    "pbs-adaptive-shared": (
        "pbs",
        {
            "block_size": 16,
            "segment_size": 64,
            "threshold": 0.6,
            "order": "adaptive",
            "order_params": {"base": "greedy", "num_rows": 32},
            "gqa": "shared",
        },
        {"threshold": 1},
    ),
    **{
        f"pbs-{target}": (
            "pbs",
            {"block_size": 32, "segment_size": 64, "threshold": 0.6, "target": target},
            {"threshold": 1.0},
        )
        for target in ("queries", "keys_then_queries", "queries_then_keys")
    },
    "pbs-adaptive-queries": (
        "pbs",
        {
            "block_size": 16,
            "segment_size": 64,
            "threshold": 0.6,
            "order": "adaptive",
            "target": "queries_then_keys",
        },
        {"threshold": 1.0},
    ),
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
    "minference": (
        "minference",
        {"vertical_size": 12, "slash_size": 10, "num_sinks": 4, "num_local": 8},
        {"slash_size": 1 << 20},
    ),
    "streaming": (
        "streaming",
        {"block_size": 32, "n_init": 20, "n_local": 70},
        {"n_local": 1 << 20},
    ),
    "streaming-tri": (
        "streaming",
        {"block_size": 32, "n_init": 20, "n_local": 70, "num_last_full": 20},
        {"n_local": 1 << 20},
    ),
    "random_blocks": ("random_blocks", {"block_size": 32, "density": 0.5}, {"density": 1.0}),
    "pbs-none": (
        "pbs",
        {"block_size": 32, "segment_size": 32, "threshold": 0.5, "order": "none"},
        {"threshold": 1.0},
    ),
}


def build(case: str, *, densest: bool = False, **changes: object):
    name, params, dense = CASES[case]
    params = {"decode_below": 0, **params, **(dense if densest else {}), **changes}
    return build_method(name, **params)
