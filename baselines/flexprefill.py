"""FlexPrefill: per head either pooled query-aware blocks or vertical and slash blocks.

Legend: see :mod:`pbs.ops.grid`; L last queries that decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.checks import check_block_size, check_positive_int, check_threshold
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.grid import BlockGrid
from pbs.ops.largest_within import largest_within
from pbs.ops.last_query_scores import last_query_scores
from pbs.ops.plan import AttentionPlan
from pbs.ops.pooling import block_logits, mean_pool, softmax_over

# Entries ranked together: 32 MiB in fp32; a GPU, which does not sort, takes them all.
MAX_RANKED = 1 << 23
MAX_RANKED_GPU = 1 << 27


@dataclass(kw_only=True)
class FlexPrefill(AttentionMethod):
    """Vertical and slash budgets by cumulative attention of the last queries, in blocks.

    Args:
        block_size: B, a power of two of at least 16.
        gamma: cumulative attention of the last queries that the budgets reach (γ), in (0, 1]; 1
            equals dense.
        tau: heads whose pooled and true distributions over blocks differ by less (Jensen-Shannon
            distance, at most 0.83) add query-aware blocks; 0 switches that branch off.
        min_budget: least tokens of each budget; None is one block. The authors use 1024 in their
            benchmarks and 512 in their README, the PBS paper none.
        max_budget: most tokens of each budget; None is no limit.
        budget_divisor: tokens per block when a budget in tokens becomes blocks; None is the block
            size, 128 the original's literal.
        nan_as_vs: True reproduces the original, in which a pooled probability of 0 makes the
            distance NaN and the head vertical-slash; False takes 0 log 0 as 0.

    Source: arXiv 2502.20766, Algorithms 1 to 4; reference code ByteDance-Seed/FlexPrefill.
    """

    knob = Knob("gamma", low=0.001, high=1.0)
    facts = Facts(
        "FlexPrefill",
        "#E69F00",
        "P",
        selection="flexprefill",
        row_local_with={"tau": 0.0},
        curve=at("gamma", 0.5, 0.7, 0.9),
    )

    block_size: int = 128
    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int | None = None
    max_budget: int | None = None
    budget_divisor: int | None = None
    nan_as_vs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_threshold(self.gamma, name="gamma")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float):
            raise TypeError(f"tau must be a number of at least 0, got {self.tau!r}")
        if not self.tau >= 0:  # also false for NaN
            raise ValueError(f"tau must be at least 0, got {self.tau}; the authors use 0.1")
        for name in ("min_budget", "max_budget", "budget_divisor"):
            value = getattr(self, name)
            if value is not None:
                check_positive_int(value, name=name)
        if (
            self.min_budget is not None
            and self.max_budget is not None
            and self.max_budget < self.min_budget
        ):
            raise ValueError(
                f"max_budget must not be below min_budget, got {self.max_budget} and "
                f"{self.min_budget}"
            )

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        q, k, scale = call.q, call.k, call.scale
        size = self.block_size
        grid = call.grid(size)
        least = -(-(self.min_budget or 1) // size)
        shortest = max(2 * size, least * size)
        if grid.num_keys <= shortest or self.gamma >= 1:
            reason = "gamma is 1" if self.gamma >= 1 else f"no more than {shortest} keys"
            return call.dense(reason, tile=size)
        sums = last_query_scores(q, k, scale=scale, last_q=size)
        vertical, slash = (part / min(size, grid.num_queries) for part in sums)
        diagonal = grid.last_positions(q.device) // size
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        offsets = diagonal[:, None] - tiles
        causal = offsets >= 0
        is_query_aware = self._is_query_aware(q, k, vertical, grid, scale)
        most = grid.num_key_tiles
        if self.max_budget is not None:
            most = min(most, -(-self.max_budget // size))
        num_columns = self._budget(vertical, least, most).masked_fill(is_query_aware, least)
        num_offsets = self._budget(slash, least, most).masked_fill(is_query_aware, least)
        column_mass = block_sums(vertical, size)
        column_mass[..., 0] = float("inf")
        # slash[o] is stored at N - 1 - o, so that pooled slot x is the block offset T - 1 - x.
        offset_mass = block_sums(slash.flip(-1), size).flip(-1)
        offset_mass[..., 0] = float("inf")
        columns = top_entries(column_mass, num_columns)
        chosen = top_entries(offset_mass, num_offsets)
        mask = columns.unsqueeze(2) | chosen[..., offsets.clamp(min=0)]
        mask = mask | self._query_aware_blocks(q, k, grid, scale, causal, is_query_aware)
        return AttentionPlan.from_block_mask(mask & causal, grid)

    def _budget(self, attention: Tensor, least: int, most: int) -> Tensor:
        """Blocks that hold γ of the attention if important tokens were contiguous, ``[Z, Hq]``."""
        count = largest_within(attention, self.gamma).counts(attention) + 1
        blocks = count // (self.budget_divisor or self.block_size) + 1
        return blocks.clamp(min=least, max=max(most, least))

    def _is_query_aware(
        self, q: Tensor, k: Tensor, vertical: Tensor, grid: BlockGrid, scale: float
    ) -> Tensor:
        """Heads whose pooled scores describe their attention well, bool ``[Z, Hq]``."""
        last = q[:, :, -self.block_size :].mean(dim=2, keepdim=True, dtype=torch.float32)
        pooled = block_logits(last, mean_pool(k, grid.key_tile)) * scale
        estimate = pooled.squeeze(2).softmax(dim=-1)
        truth = block_sums(vertical, grid.key_tile)
        return self._distance(truth, estimate) < self.tau

    def _distance(self, p: Tensor, q: Tensor) -> Tensor:
        """Jensen-Shannon distance of the last dims, natural logarithm."""
        middle = (p + q) / 2

        def divergence(x: Tensor) -> Tensor:
            terms = x * (x / middle).log()
            return (terms if self.nan_as_vs else terms.nan_to_num(0.0)).sum(-1)

        half = (divergence(p) + divergence(q)) / 2
        return (half if self.nan_as_vs else half.clamp(min=0.0)).sqrt()

    def _query_aware_blocks(
        self,
        q: Tensor,
        k: Tensor,
        grid: BlockGrid,
        scale: float,
        causal: Tensor,
        is_query_aware: Tensor,
    ) -> Tensor:
        """Blocks by pooled scores, all rows of a head ranked together, bool ``[Z, Hq, Tq, Tk]``.

        The block that crosses γ is left out, as in the original: rows with peaked scores are served
        first.
        """
        selected = torch.zeros(
            *is_query_aware.shape, *causal.shape, dtype=torch.bool, device=q.device
        )
        some = is_query_aware.any(dim=0).nonzero().flatten()  # waits for the device
        if not len(some):
            return selected
        logits = block_logits(mean_pool(q, grid.query_tile), mean_pool(k, grid.key_tile)) * scale
        goal = self.gamma * grid.num_query_tiles
        # Ranks take five times the memory of what is ranked.
        limit = MAX_RANKED_GPU if q.is_cuda else MAX_RANKED
        step = max(1, limit // logits[:, 0].numel())
        for heads in some.split(step):
            probabilities = softmax_over(logits[:, heads], causal).flatten(2)
            within = largest_within(probabilities, goal)
            selected[:, heads] = within.mask(probabilities).unflatten(2, causal.shape)
        return selected & is_query_aware[..., None, None]


def block_sums(x: Tensor, tile: int) -> Tensor:
    """Sums over tiles of the last dim from index 0 upward, ``[.., T]`` from ``[.., N]``."""
    num_tiles = -(-x.shape[-1] // tile)
    return pad(x, (0, num_tiles * tile - x.shape[-1])).unflatten(-1, (num_tiles, tile)).sum(-1)


def top_entries(mass: Tensor, count: Tensor) -> Tensor:
    """The ``count`` largest entries of each row, bool like ``mass``; ties to the lower index."""
    order = mass.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    places = torch.arange(mass.shape[-1], device=mass.device).expand_as(order)
    return rank.scatter_(-1, order, places) < count.unsqueeze(-1)
