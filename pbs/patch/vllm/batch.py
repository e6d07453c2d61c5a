"""Which rows of a batch are chunks of prompts for the method, and what is left for vLLM.

vLLM computes many requests at once: their new tokens lie one behind the other in q. A request has
``query_start_loc[i + 1] - query_start_loc[i]`` of them, the last of its ``seq_lens[i]`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one prompt.

    Attributes:
        request: its number in the batch.
        start: its first row of q.
        stop: one past its last row.
        num_keys: tokens that its last row sees, cached ones included.
    """

    request: int
    start: int
    stop: int
    num_keys: int

    @property
    def rows(self) -> slice:
        """Its rows of q."""
        return slice(self.start, self.stop)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the prompt was computed before."""
        return self.num_keys == self.stop - self.start


@dataclass
class Split:
    """A batch in two.

    Attributes:
        chunks: what the method computes.
        dense: why other chunks of prompts are left to vLLM, with their count.
        rest_requests: numbers of the requests left, int64; None if none is.
        rest_rows: their rows of q.
        rest: vLLM's metadata of them.
    """

    chunks: list[Chunk]
    dense: dict[str, int] = field(default_factory=dict)
    rest_requests: Tensor | None = None
    rest_rows: slice | Tensor | None = None
    rest: Any = None


def find_chunks(
    common: Any, *, min_keys: int, min_queries: int
) -> tuple[list[Chunk], dict[str, int]]:
    """Chunks of prompts that are worth a selection, and why others are not, with their count.

    Looks at what vLLM keeps on the CPU: a GPU is not waited for.

    Args:
        common: ``CommonAttentionMetadata`` of the batch.
        min_keys: fewest keys of a chunk.
        min_queries: fewest tokens of a chunk that has some cached before it.
    """
    starts = common.query_start_loc_cpu.tolist()
    bounds = common.seq_lens_cpu_upper_bound  # exact where a prompt is prefilled
    lengths = (common.seq_lens if bounds is None else bounds).tolist()
    flags = common.is_prefilling
    flags = [True] * common.num_reqs if flags is None else flags.tolist()
    chunks, dense = [], dict[str, int]()
    for request in range(min(common.num_reqs, len(flags))):  # the rest pads a captured graph
        chunk = Chunk(request, starts[request], starts[request + 1], int(lengths[request]))
        if not flags[request] or chunk.stop == chunk.start:
            continue  # a decoding step, or nothing
        if chunk.num_keys < min_keys:
            reason = f"fewer keys than min_keys={min_keys}"
        elif not chunk.is_whole and chunk.stop - chunk.start < min_queries:
            reason = f"a chunk of fewer tokens than decode_below={min_queries}"
        else:
            chunks.append(chunk)
            continue
        dense[reason] = dense.get(reason, 0) + 1
    return chunks, dense


def split_batch(common: Any, *, min_keys: int, min_queries: int) -> tuple[Split | None, Any]:
    """The split, and vLLM's common metadata of what is left.

    Returns:
        None for the split where the method computes nothing and no chunk was refused; None for the
        metadata where nothing is left, or everything is.
    """
    if common.causal is not True:
        return None, None
    chunks, dense = find_chunks(common, min_keys=min_keys, min_queries=min_queries)
    if not chunks:
        return (Split([], dense) if dense else None), None
    starts = common.query_start_loc_cpu.tolist()
    taken = {chunk.request for chunk in chunks}
    left = [
        request
        for request in range(common.num_reqs)
        if request not in taken and starts[request + 1] > starts[request]
    ]
    if not left:
        return Split(chunks, dense), None
    counts = [starts[request + 1] - starts[request] for request in left]
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in left])
    device = common.query_start_loc.device
    requests, places = torch.tensor(left, device=device), rows.to(device)
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    optional = {
        name: None if getattr(common, name) is None else getattr(common, name)[left]
        for name in ("is_prefilling", "seq_lens_cpu_upper_bound")
    }
    rest = common.replace(
        query_start_loc=ends.to(device),
        query_start_loc_cpu=ends,
        seq_lens=common.seq_lens[requests],
        num_reqs=len(left),
        num_actual_tokens=len(rows),
        max_query_len=max(counts),
        block_table_tensor=common.block_table_tensor[requests],
        slot_mapping=common.slot_mapping[places],
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **optional,
    )
    is_run = int(rows[-1]) - int(rows[0]) == len(rows) - 1
    where = slice(int(rows[0]), int(rows[-1]) + 1) if is_run else places
    return Split(chunks, dense, requests, where), rest
