"""How many selected tiles a kernel could skip, on a real model.

    python -m experiments.tools.selection_lab.skipping OUT.csv --length 8192     # a CPU: minutes

A kernel that holds rows of queries computes the logits of each selected tile. Where the largest
lies so far below what each row has seen that its weight is below a factor, the softmax and the
second product could be left out. A skipped key then has at most that factor of the weight of the
row's largest one, so that a row loses at most the factor times the keys skipped. Needs
``make model-smollm2``.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.gate.head_plan import HeadPlan
from pbs import build_method
from pbs.methods.base import CallRecord
from pbs.patch.huggingface import apply_patch_with_prefill

FACTORS = (1e-2, 1e-3, 1e-4)
# Rows that decide together: those of a warpgroup in the kernel for Hopper.
ROWS = 64
# Every so many layers, heads and query tiles are looked at; the first tiles have little to select.
LAYERS, HEADS, TILES, FIRST_TILE = 5, 2, 4, 8
METHODS = ("pbs_calibrated", "pbs")
COLUMNS = ("method", "threshold", "tokens", "text", "order", "factor", "selected", "skipped")
LOST = ("rows", "lost_mean", "lost_worst")


def skipped(
    largest: Tensor, masses: Tensor, seen: Tensor, *, factor: float, sorts: bool
) -> tuple[int, Tensor]:
    """Tiles that some rows skip one after another, and what each row then loses.

    Args:
        largest: the largest logit of each row in each selected tile, ``[R, n]``.
        masses: share of each row's attention that a tile holds, ``[R, n]``.
        seen: the largest logit of each row before the first tile, ``[R]``.
        factor: least weight, over that of the largest key so far, that is not skipped.
        sorts: tiles with the largest logits come first; else in their order.

    Returns:
        The number of tiles, and the share of its attention that each row loses, ``[R]``.
    """
    order = torch.arange(largest.shape[1])
    if sorts and len(order):
        order = (largest - seen[:, None]).amax(dim=0).argsort(descending=True)
    count, lost = 0, torch.zeros_like(seen)
    for tile in order.tolist():
        if bool(((largest[:, tile] - seen) < math.log(factor)).all()):
            count += 1
            lost += masses[:, tile]
        else:
            seen = torch.maximum(seen, largest[:, tile])
    return count, lost


class Counter:
    """Hears a method's calls and counts what could be skipped in them."""

    def __init__(self) -> None:
        self.selected = 0
        self.rows = 0
        self.counts = {(sorts, factor): 0 for sorts in (False, True) for factor in FACTORS}
        self.total = dict.fromkeys(self.counts, 0.0)
        self.worst = dict.fromkeys(self.counts, 0.0)

    def __call__(self, call: CallRecord) -> None:
        """One layer."""
        if call.plan.is_dense or call.layer_idx is None or call.layer_idx % LAYERS != 1:
            return
        for head in range(0, call.q.shape[1], HEADS):
            lists = HeadPlan.of(call.plan, 0, head)
            for tile in range(FIRST_TILE, call.plan.grid.num_query_tiles, TILES):
                self._look_at(call, lists, head, tile)

    def _look_at(self, call: CallRecord, lists: HeadPlan, head: int, tile: int) -> None:
        grid = call.plan.grid
        keys = call.k[0, head // (call.q.shape[1] // call.k.shape[1])].float()
        whole, window = lists.whole_keys(tile), lists.window_keys(tile, grid.num_keys)
        for first in range(tile * grid.query_tile, (tile + 1) * grid.query_tile, ROWS):
            rows = torch.arange(first, min(first + ROWS, grid.num_queries))
            if not len(rows) or not len(whole):
                continue
            queries = call.q[0, head, rows].float() * call.scale
            near = queries @ keys[window].T
            near = near.masked_fill(~lists.sees(rows + grid.offset, window), -math.inf)
            far = (queries @ keys[whole].T).unflatten(1, (-1, grid.key_tile))
            total = torch.cat([near, far.flatten(1)], dim=1).logsumexp(dim=1)
            masses = (far.logsumexp(dim=2) - total[:, None]).exp()
            self.selected += far.shape[1]
            self.rows += len(rows)
            for sorts, factor in self.counts:
                count, lost = skipped(
                    far.amax(dim=2), masses, near.amax(dim=1), factor=factor, sorts=sorts
                )
                self.counts[sorts, factor] += count
                self.total[sorts, factor] += float(lost.sum())
                self.worst[sorts, factor] = max(self.worst[sorts, factor], float(lost.max()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a row for each method, order and factor."""
    from experiments.tools.selection_lab.__main__ import TEXTS, Bench

    parser = argparse.ArgumentParser(prog="python -m experiments.tools.selection_lab.skipping")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threshold", type=float, default=0.9)
    options = parser.parse_args(arguments)
    bench = Bench(options.length, 1, 1, "cpu")
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *LOST])
        for name in METHODS:
            for text, ids in zip(TEXTS, bench.ids, strict=True):
                method = build_method(name, threshold=options.threshold)
                method.recorder = counter = Counter()
                with apply_patch_with_prefill(bench.model, method):
                    bench.hidden(ids)
                for (sorts, factor), count in counter.counts.items():
                    order = "largest first" if sorts else "plan"
                    where = (name, options.threshold, options.length, text, order, factor)
                    mean = counter.total[sorts, factor] / max(counter.rows, 1)
                    lost = (counter.rows, f"{mean:.3g}", f"{counter.worst[sorts, factor]:.3g}")
                    writer.writerow([*where, counter.selected, count, *lost])


if __name__ == "__main__":
    main()
