"""What a plan owes by its method's documentation, from the formulas and not from the plan."""

import torch

from pbs import AttentionPlan
from tests.ops.attention_truth import causal_mask
from tests.properties.draws import Case, is_densest

# What pbs.methods says of `local_blocks` where a case does not.
LOCAL_BLOCKS = {"pbs": None, "pbs_plus": None, "pbs_calibrated": 1}


def promised_pairs(case: Case, plan: AttentionPlan) -> tuple[torch.Tensor, bool]:
    """Pairs that must be computed, bool ``[Hq or 1, Nq, Nk]``, and whether no others may be.

    In every method the query itself; then the own segment or tile, the sink, the fixed windows.
    """
    grid = plan.grid
    causal = causal_mask(grid.num_queries, grid.num_keys)
    if plan.is_dense or case.name == "flash" or is_densest(case):
        return causal[None], True
    rows = torch.arange(grid.num_queries)[:, None]
    keys = torch.arange(grid.num_keys)
    positions = rows + grid.offset
    if case.name == "minference":
        return _minference(case, causal, positions, keys, rows), False
    if case.name == "streaming":
        n_init, n_local = case.params["n_init"], case.params["n_local"]
        promised = (keys < n_init) | (positions - keys < n_local)
        num_last_full = case.params.get("num_last_full", 0)
        promised |= rows >= grid.num_queries - num_last_full
        return (promised & causal)[None], not num_last_full
    if case.name in ("pbs", "pbs_plus", "pbs_calibrated"):
        segment = case.params["segment_size"]
        promised = keys // segment == positions // segment
        local = case.params.get("local_blocks", LOCAL_BLOCKS[case.name])
        if local is not None:
            tile = case.params["block_size"]
            first = rows // tile * tile + grid.offset
            promised &= keys // tile >= first // tile - local
        if case.params["force_select_first_block"]:
            promised |= keys == 0
    else:
        tile = case.params["block_size"]
        promised = _own_tiles(rows, keys, tile, grid.offset)
        if case.params.get("force_select_first_block", True):
            promised |= keys < tile
    return (promised & causal)[None], False


def _own_tiles(rows, keys, tile, offset):
    """Keys from the beginning of the tile on that the first query of the row's tile lies in."""
    first = rows // tile * tile + offset
    return keys >= first // tile * tile


def _minference(case, causal, positions, keys, rows):
    """Per head: lines that are always chosen, the A-shape, or the own tile."""
    lines = (keys < case.params["num_sinks"]) | (positions - keys < case.params["num_local"])
    if not case.heads:
        return (lines & causal)[None]
    by_head = []
    for pattern, first, second in case.heads:
        if pattern == "stream_llm":
            by_head.append((keys < first) | (positions - keys < second))
        elif pattern == "block_sparse":
            by_head.append(_own_tiles(rows, keys, 64, len(keys) - len(rows)))
        else:
            by_head.append(lines)
    return torch.stack(by_head) & causal


def largest_density(case: Case, plan: AttentionPlan) -> float:
    """The most that a plan may compute, in multiples of dense attention's tiles.

    1, with two exceptions that the documentation names. Columns are gathered in tiles of their own
    beside windows that need not be aligned: at most one tile more per query tile. A tile of moved
    queries computes its whole chunk's segment, also the part after its queries.
    """
    extra = 0
    if plan.columns is not None:
        extra = 1
    elif plan.query_order is not None:
        extra = case.params["segment_size"] // plan.grid.key_tile - 1
    return 1 + extra * plan.grid.num_query_tiles / plan.grid.num_causal_tiles
