"""MInference: a pattern per head, with lines chosen by the last queries.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from baselines.minference_config import (
    A_SHAPE,
    BLOCK_SPARSE,
    VERTICAL_SLASH,
    HeadSetting,
    load_head_settings,
)
from baselines.streaming import a_shape_tiles
from baselines.vertical_slash import (
    TILE,
    keep_largest,
    vertical_slash_lists,
)
from pbs.checks import check_choice, check_integer, check_table
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts
from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.last_query_scores import last_query_scores
from pbs.ops.plan import AttentionPlan
from pbs.ops.pooling import block_logits, mean_pool

logger = logging.getLogger(__name__)

# (vertical size, slash size) of every head.
PRESET_SIZES = {"paper": (1000, 6096), "llama31-v2": (512, 2048)}
PRESETS = (*PRESET_SIZES, "adaptive", "official")
# Smallest value of each integer parameter.
SMALLEST = {
    "vertical_size": 1,
    "slash_size": 1,
    "last_q": 1,
    "num_sinks": 0,
    "num_local": 1,
    "top_k": 1,
    "starting_layer": -1,
}


@dataclass(kw_only=True)
class MInference(AttentionMethod):
    """Vertical-slash, A-shape and block-sparse heads on tiles of 64 x 64.

    A vertical-slash head computes the key columns and the offsets (query position - key position)
    to which the last queries pay most attention. Offsets are widened to the windows of 64 keys
    they cross in each tile of 64 queries (:func:`baselines.vertical_slash.vertical_slash_lists`).
    Budgets are fixed: with at most ``slash_size`` or ``vertical_size`` keys it is dense.

    Args:
        preset: "paper" ((vertical, slash) = (1000, 6096) in every head: what the PBS paper ran),
            "llama31-v2" ((512, 2048): the authors' file for Llama-3.1-8B), "adaptive" (0.2 and 0.8
            of ``adaptive_budget`` times the keys) or "official" (per head, from ``config_path``).
        config_path: JSON file in MInference's format, for preset "official".
        vertical_size: columns in every head instead of the preset's, at least 1; for presets
            "paper" and "llama31-v2".
        slash_size: offsets in every head instead of the preset's, likewise.
        adaptive_budget: ρ, in (0, 1], for preset "adaptive".
        last_q: how many of the last queries choose the lines.
        num_sinks: first columns that are always chosen; also the fewest columns.
        num_local: offsets 0 .. num_local - 1 are always chosen; also the fewest offsets.
        top_k: key tiles per query tile of a block-sparse head.
        starting_layer: layers below it run dense.

    Source: arXiv 2407.02490 and microsoft/MInference. Unlike there, the fewest offsets are 100 and
    not 50, of which 100 tied ones could lose offset 0; block-sparse heads get their diagonal; a
    head without an entry in the file is an error.
    """

    knob = Knob("adaptive_budget", low=0.001, high=1.0, fixed={"preset": "adaptive"})
    facts = Facts(
        "MInference",
        "#009E73",
        "^",
        selection="last_queries",
        curve=(
            {"vertical_size": 16, "slash_size": 64},
            {"vertical_size": 64, "slash_size": 256},
            {"vertical_size": 256, "slash_size": 1024},
        ),
    )

    preset: str = "paper"
    config_path: str | None = None
    vertical_size: int | None = None
    slash_size: int | None = None
    adaptive_budget: float | None = None
    last_q: int = 64
    num_sinks: int = 30
    num_local: int = 100
    top_k: int = 100
    starting_layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.preset, PRESETS, name="preset")
        for name, smallest in SMALLEST.items():
            value = getattr(self, name)
            if value is not None or name not in ("vertical_size", "slash_size"):
                check_integer(value, name=name, smallest=smallest)
        self._check_preset()
        self._layers: list[list[HeadSetting]] | None = None
        if self.config_path is not None:
            self._layers = load_head_settings(self.config_path)
        if self.preset == "paper" and self.vertical_size is None and self.slash_size is None:
            logger.warning(
                "MInference with preset 'paper': (vertical, slash) = (1000, 6096) in every head, "
                "nearly dense below 16K tokens; the authors' per-head files need "
                "preset='official' and config_path"
            )

    def check_model(self, *, num_layers: int, num_heads: int | None) -> None:
        """See the base class: the file's layers and heads are the model's."""
        if self.starting_layer >= num_layers:
            raise ValueError(
                f"starting_layer={self.starting_layer}, but the model has {num_layers} layers: all "
                "would run dense; choose a layer of the model, or the method 'flash'"
            )
        if self._layers is not None:
            check_table(
                str(self.config_path),
                (len(self._layers), len(self._layers[0])),
                num_layers=num_layers,
                num_heads=num_heads,
            )

    def densest(self) -> AttentionMethod:
        """See the base class."""
        return replace(
            self,
            preset="paper",
            config_path=None,
            adaptive_budget=None,
            vertical_size=None,
            slash_size=1 << 30,
        )

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        q, k, scale = call.q, call.k, call.scale
        batch, num_heads = q.shape[:2]
        grid = call.grid(TILE)
        settings = self._head_settings(call.layer_idx, num_heads, grid.num_keys)
        reason = ""
        if self._is_below_starting_layer(call.layer_idx):
            reason = "layer below starting_layer"
        elif all(self._is_dense(setting, grid) for setting in settings):
            reason = "no more keys than the budget of every head"
        if reason:
            return call.dense(reason, tile=TILE)
        parts = {}
        for pattern, make in (
            (VERTICAL_SLASH, self._vertical_slash_plan),
            (A_SHAPE, self._a_shape_plan),
            (BLOCK_SPARSE, self._block_sparse_plan),
        ):
            heads = [head for head, setting in enumerate(settings) if setting.pattern == pattern]
            if heads:
                parts[tuple(heads)] = make(q, k, scale, grid, settings, heads)
        if len(parts) == 1:
            return next(iter(parts.values()))
        return _merge(parts, grid, batch, num_heads)

    def _vertical_slash_plan(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        grid: BlockGrid,
        settings: list[HeadSetting],
        heads: list[int],
    ) -> AttentionPlan:
        """Plan of the vertical-slash heads."""
        vertical, slash = last_query_scores(q, k, scale=scale, last_q=self.last_q)
        if len(heads) < q.shape[1]:
            vertical, slash = vertical[:, heads], slash[:, heads]
        vertical[..., : self.num_sinks] = float("inf")
        slash[..., : self.num_local] = float("inf")
        counts = [self._line_counts(settings[head], grid.num_keys) for head in heads]
        columns = keep_largest(vertical, [count for count, _ in counts])
        offsets = keep_largest(slash, [count for _, count in counts])
        lists = vertical_slash_lists(columns, offsets, grid)
        blocks, num_blocks = lists.windows[:1, :1, :, :0], torch.zeros_like(lists.num_windows)
        return AttentionPlan(grid, q.shape[0], len(heads), blocks, num_blocks[:1, :1], *lists)

    @override
    def _a_shape_plan(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        grid: BlockGrid,
        settings: list[HeadSetting],
        heads: list[int],
    ) -> AttentionPlan:
        """Plan of the A-shape heads, the same for all sequences."""
        # No more than there are keys: sizes of a file may not fit into 32 bits.
        rows = [[min(size, grid.num_keys) for size in settings[head].sizes] for head in heads]
        sizes = torch.tensor(rows, dtype=torch.int32, device=q.device)
        whole, partial = a_shape_tiles(grid, sizes)
        blocks, num_blocks = list_blocks(whole[None])
        tiles, num_windows = list_blocks(partial[None])
        lists = (blocks, num_blocks, tiles.int() * TILE, num_windows)
        return AttentionPlan(grid, q.shape[0], len(heads), *lists, local_window=sizes)

    @override
    def _block_sparse_plan(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        grid: BlockGrid,
        settings: list[HeadSetting],
        heads: list[int],
    ) -> AttentionPlan:
        """Plan of the block-sparse heads: the key tiles with the largest pooled logits."""
        scores = block_logits(mean_pool(q, TILE), mean_pool(k, TILE))[:, heads]
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        causal = tiles <= grid.last_positions(q.device)[:, None] // TILE
        counts = [min(self.top_k, grid.num_key_tiles)] * len(heads)
        mask = keep_largest(scores.masked_fill(~causal, float("-inf")), counts)
        return AttentionPlan.from_block_mask(mask, grid)

    def _head_settings(
        self, layer_idx: int | None, num_heads: int, num_keys: int
    ) -> list[HeadSetting]:
        """Pattern and sizes of every head of this layer."""
        if self._layers is not None:
            return self._file_settings(self._layers, layer_idx, num_heads)
        if self.adaptive_budget is not None:
            budget = self.adaptive_budget * num_keys
            sizes = (round(0.2 * budget), round(0.8 * budget))
        else:
            sizes = PRESET_SIZES[self.preset]
        vertical = sizes[0] if self.vertical_size is None else self.vertical_size
        slash = sizes[1] if self.slash_size is None else self.slash_size
        return [HeadSetting(VERTICAL_SLASH, (vertical, slash))] * num_heads

    def _file_settings(
        self, layers: list[list[HeadSetting]], layer_idx: int | None, num_heads: int
    ) -> list[HeadSetting]:
        """The file's entries for this layer."""
        if layer_idx is None:
            raise ValueError(
                "preset 'official' has settings per layer: pass layer_idx to the method"
            )
        if not 0 <= layer_idx < len(layers) or len(layers[0]) != num_heads:
            raise ValueError(
                f"{self.config_path} is for {len(layers)} layers of {len(layers[0])} heads, got "
                f"layer {layer_idx} of {num_heads} heads; use the file made for this model"
            )
        return layers[layer_idx]

    def _line_counts(self, setting: HeadSetting, num_keys: int) -> tuple[int, int]:
        """How many columns and offsets a vertical-slash head chooses."""
        vertical = max(setting.sizes[0], self.num_sinks, 1)
        slash = max(setting.sizes[1], self.num_local)
        if vertical >= num_keys:  # all columns are all pairs: whole windows are the cheaper form
            slash = num_keys
        return min(vertical, num_keys), min(slash, num_keys)

    def _is_dense(self, setting: HeadSetting, grid: BlockGrid) -> bool:
        """Whether the head computes every causal pair of every input of this length."""
        if setting.pattern == VERTICAL_SLASH:
            return self._line_counts(setting, grid.num_keys)[1] >= grid.num_keys
        if setting.pattern == A_SHAPE:
            return sum(setting.sizes) >= grid.num_keys
        return self.top_k >= grid.num_key_tiles

    def _is_below_starting_layer(self, layer_idx: int | None) -> bool:
        if self.starting_layer <= 0:
            return False
        if layer_idx is None:
            raise ValueError(
                f"starting_layer={self.starting_layer} needs the layer: pass layer_idx to the "
                "method"
            )
        return layer_idx < self.starting_layer

    def _check_preset(self) -> None:
        """Each preset takes its own parameters and no others."""
        needs = {"official": "config_path", "adaptive": "adaptive_budget"}
        for preset, name in needs.items():
            given = getattr(self, name) is not None
            if given and self.preset != preset:
                raise ValueError(
                    f"{name} is for preset {preset!r}, got preset {self.preset!r}; set "
                    f"preset={preset!r} or leave {name} out"
                )
            if self.preset == preset and not given:
                raise ValueError(f"preset {preset!r} needs {name}")
        if self.preset in needs:
            for name in ("vertical_size", "slash_size"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} replaces a size of presets {', '.join(PRESET_SIZES)}; preset "
                        f"{self.preset!r} has its own"
                    )
        budget = self.adaptive_budget
        if budget is not None:
            if isinstance(budget, bool) or not isinstance(budget, int | float):
                raise TypeError(f"adaptive_budget must be a number in (0, 1], got {budget!r}")
            if not 0 < budget <= 1:
                raise ValueError(f"adaptive_budget must lie in (0, 1], got {budget}")


def _merge(
    parts: dict[tuple[int, ...], AttentionPlan], grid: BlockGrid, batch: int, num_heads: int
) -> AttentionPlan:
    """One plan of all heads from the plans of some heads each; lists as wide as the widest."""
    device = next(iter(parts.values())).device

    def joined(name: str) -> tuple[Tensor, Tensor]:
        """All heads' lists of this name, and their counts."""
        lists = {heads: getattr(plan, name) for heads, plan in parts.items()}
        width = max(entries.shape[-1] for entries in lists.values() if entries is not None)
        shape = (batch, num_heads, grid.num_query_tiles)
        merged = torch.zeros(*shape, width, dtype=torch.int32, device=device)
        counts = torch.zeros(shape, dtype=torch.int32, device=device)
        for heads, entries in lists.items():
            if entries is not None:
                merged[:, heads, :, : entries.shape[-1]] = entries
                counts[:, heads] = getattr(parts[heads], f"num_{name}")
        return merged, counts

    columns = num_columns = local_window = None
    if any(plan.columns is not None for plan in parts.values()):
        columns, num_columns = joined("columns")
    if any(plan.local_window is not None for plan in parts.values()):
        # Heads without the rule see all of a window: every key is among the first Nk.
        rule = torch.tensor([grid.num_keys, 1], dtype=torch.int32, device=device)
        local_window = rule.repeat(num_heads, 1)
        for heads, plan in parts.items():
            if plan.local_window is not None:
                local_window[list(heads)] = plan.local_window
    return AttentionPlan(
        grid,
        batch,
        num_heads,
        *joined("blocks"),
        *joined("windows"),
        columns=columns,
        num_columns=num_columns,
        local_window=local_window,
    )
