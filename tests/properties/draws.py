"""Random calls of every method: parameters, shapes, tensors and padding, drawn by hypothesis."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from baselines.minference_config import PATTERNS
from pbs import AttentionMethod, Geometry, build_method
from pbs.orders import ORDERS
from pbs.selectors import SELECTORS
from pbs.testing import make_qkv

BLOCK_SIZES = st.sampled_from([16, 32, 64])
STRUCTURES = st.sampled_from(["random", "vertical", "slash", "mixed"])
# Mostly fp32, whose error is small enough for a single lost key to show.
DTYPES = st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.float16])


@dataclass(frozen=True)
class Case:
    """One call of a method. Its tensors follow from ``seed``.

    ``heads`` holds MInference's entry per query head, for preset "official"; empty otherwise.
    """

    name: str
    params: dict[str, Any]
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    geometry: Geometry
    dtype: torch.dtype
    structure: str
    seed: int
    heads: tuple[tuple[str, int, int], ...] = ()

    def build(self, folder: Path) -> AttentionMethod:
        """The method; a file that it reads is written to the folder."""
        if not self.heads:
            return build_method(self.name, decode_below=0, **self.params)
        path = folder / "heads.json"
        layer = {str(index): [*entry, 1.0] for index, entry in enumerate(self.heads)}
        path.write_text(json.dumps([layer]))
        return build_method(self.name, decode_below=0, config_path=str(path), **self.params)

    def tensors(self):
        """q, k and v of the call."""
        return make_qkv(
            self.batch,
            self.q_heads,
            self.kv_heads,
            self.geometry.num_keys,
            self.head_dim,
            num_queries=self.geometry.num_queries,
            dtype=self.dtype,
            structure=self.structure,
            seed=self.seed,
        )


def thresholds(low: float = 0.001):
    """Shares to reach: the ends, what the papers use, and anything between."""
    return st.sampled_from([low, 0.3, 0.5, 0.6, 0.7, 0.9, 1]) | st.floats(low, 0.95)


@st.composite
def cases(draw, name: str, max_keys: int):
    """A call of the method of this name with at most so many key slots."""
    kv_heads = draw(st.integers(1, 2))
    q_heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([16, 24, 32]))
    heads: tuple[tuple[str, int, int], ...] = ()
    params = draw(PARAMETERS[name])
    if name == "minference" and params.get("preset") == "official":
        heads = tuple(draw(HEAD) for _ in range(q_heads))
    if name == "xattention" and draw(st.booleans()):
        params["threshold"] = [draw(thresholds(0.0)) for _ in range(q_heads)]
    batch = draw(st.integers(1, 3))
    return Case(
        name=name,
        params=params,
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        geometry=draw(geometries(batch, max_keys)),
        dtype=draw(DTYPES),
        structure=draw(STRUCTURES),
        seed=draw(st.integers(0, 999)),
        heads=heads,
    )


@st.composite
def geometries(draw, batch: int, max_keys: int):
    """Counts beside every tile's border, and no padding, padding on one side or on both.

    A cache may have room after the queries, and a sequence may have no real token.
    """
    is_short = draw(st.sampled_from([False, False, False, True]))
    num_keys = draw(lengths(1 if is_short else max_keys // 2, max_keys))
    num_queries = num_keys
    if draw(st.sampled_from([False, False, True])):
        num_queries = draw(lengths(1, num_keys))
    padding = draw(st.sampled_from(["none", "none", "none", "left", "right", "both"]))
    if padding == "none":
        return Geometry.unpadded(batch, num_queries, num_keys)
    offset = num_keys - num_queries
    if padding == "both":
        offset = draw(st.integers(0, offset))
    starts, ends = [0] * batch, [num_keys] * batch
    for sequence in range(batch):
        if padding != "right":
            starts[sequence] = draw(st.integers(0, num_keys // 2))
        if padding != "left":
            ends[sequence] = draw(st.integers(num_keys // 2, num_keys))
        if draw(st.integers(0, 9)) == 9:
            starts[sequence] = ends[sequence]
    return Geometry(num_queries, num_keys, offset, tuple(starts), tuple(ends))


@st.composite
def lengths(draw, shortest: int, longest: int):
    """A count in [shortest, longest]; half of them near a multiple of 16, 32 or 64."""
    count = draw(st.integers(shortest, longest))
    if draw(st.booleans()):
        return count
    unit = draw(st.sampled_from([16, 32, 64]))
    return min(max(count // unit * unit + draw(st.integers(-2, 2)), shortest), longest)


@st.composite
def _pbs(draw, selectors):
    block_size = draw(BLOCK_SIZES)
    params: dict[str, Any] = {
        "block_size": block_size,
        "segment_size": block_size * draw(st.integers(1, 4 if block_size < 64 else 2)),
        "threshold": draw(thresholds()),
        "order": draw(st.sampled_from(ORDERS.names)),
        "target": draw(
            st.sampled_from(["keys", "keys", "queries", "keys_then_queries", "queries_then_keys"])
        ),
        "gqa": draw(st.sampled_from(["per_query_head", "shared"])),
        "force_select_first_block": draw(st.booleans()),
        "pad_mean": draw(st.sampled_from(["real", "reference"])),
    }
    counts = [None, 0, 1, 2] if params["target"] == "keys" else [None]
    params["local_blocks"] = draw(st.sampled_from(counts))
    if params["order"] == "adaptive":
        base = draw(st.sampled_from(sorted({*ORDERS.names} - {"adaptive", "none"})))
        params["order_params"] = {"base": base, "num_rows": draw(st.integers(1, 64))}
    if selectors:
        params["selector"] = draw(st.sampled_from(selectors))
        if params["selector"] in ("antidiagonal", "oracle"):
            normaliser = draw(st.sampled_from(["candidates", "causal"]))
            params["selector_params"] = {"normaliser": normaliser}
    else:
        params["stride"] = draw(st.sampled_from([4, 8, 16]))
        params["normaliser"] = draw(st.sampled_from(["candidates", "causal"]))
    return params


@st.composite
def _streaming(draw):
    block_size = draw(BLOCK_SIZES)
    params = {"block_size": block_size, "n_init": draw(lengths(0, 60))}
    if draw(st.booleans()):
        return params | {"n_local": draw(lengths(1, 100))}
    # Tri-shape has a least window.
    return params | {
        "n_local": draw(lengths(2 * block_size, 130)),
        "num_last_full": draw(lengths(1, 60)),
    }


@st.composite
def _flexprefill(draw):
    params = {
        "block_size": draw(BLOCK_SIZES),
        "gamma": draw(thresholds()),
        "tau": draw(st.sampled_from([0.0, 0.1, 0.3, 1.0])),
        "nan_as_vs": draw(st.booleans()),
        "budget_divisor": draw(st.sampled_from([None, 16, 128])),
        "min_budget": draw(st.none() | st.integers(1, 100)),
    }
    least = params["min_budget"] or 1
    return params | {"max_budget": draw(st.none() | st.integers(least, 200))}


@st.composite
def _minference(draw):
    params = {
        "last_q": draw(st.integers(1, 80)),
        "num_sinks": draw(st.integers(0, 20)),
        "num_local": draw(st.integers(1, 20)),
    }
    preset = draw(st.sampled_from(["paper", "adaptive", "official"]))
    if preset == "paper":
        sizes = {"vertical_size": st.integers(1, 60), "slash_size": st.integers(1, 12)}
        return params | {size: draw(values) for size, values in sizes.items()}
    if preset == "adaptive":
        return params | {"preset": preset, "adaptive_budget": draw(thresholds())}
    return params | {"preset": preset, "top_k": draw(st.integers(1, 4))}


# Pattern, then columns and offsets, or first and last tokens; a local window is never empty.
HEAD = st.tuples(st.sampled_from(PATTERNS), st.integers(0, 40), st.integers(1, 40))

# One strategy for each of `pbs.methods.METHODS`; what is not drawn has its default.
PARAMETERS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "flash": st.just({}),
    "meanpool": st.fixed_dictionaries(
        {
            "block_size": BLOCK_SIZES,
            "threshold": thresholds(),
            "force_select_first_block": st.booleans(),
            "pad_mean": st.sampled_from(["real", "reference"]),
        }
    ),
    "pbs": _pbs(SELECTORS.names),
    "pbs_plus": _pbs(None),
    "pbs_calibrated": _pbs(SELECTORS.names),
    "xattention": st.fixed_dictionaries(
        {
            "block_size": BLOCK_SIZES,
            "stride": st.sampled_from([4, 8, 16]),
            "threshold": thresholds(0.0),
            "first_chunk": st.sampled_from(["minimal", "reference"]),
        }
    ),
    "flexprefill": _flexprefill(),
    "prism": st.fixed_dictionaries(
        {
            "block_size": BLOCK_SIZES,
            "threshold": thresholds(),
            "high_dims": st.sampled_from([None, 2, 8, 16]),
            "low_dims": st.sampled_from([None, 2, 8, 16]),
            "rope_layout": st.sampled_from(["half", "interleaved"]),
        }
    ),
    "minference": _minference(),
    "streaming": _streaming(),
    "random_blocks": st.fixed_dictionaries(
        {
            "block_size": BLOCK_SIZES,
            "density": thresholds(),
            "force_select_first_block": st.booleans(),
            "seed": st.integers(0, 2**33),
        }
    ),
}


def is_densest(case: Case) -> bool:
    """Whether the parameters ask for everything."""
    for name in ("threshold", "gamma", "density"):
        value = case.params.get(name)
        if value is not None:
            return all(v >= 1 for v in value) if isinstance(value, list) else value >= 1
    return False


def scale_of(case: Case) -> float:
    """The default factor of the logits."""
    return 1 / math.sqrt(case.head_dim)
