"""Variants of ``pbs_calibrated`` and the library's methods at equal density, on a real model.

    python -m experiments.tools.selection_lab OUT.csv                # everything, on a GPU: minutes
    python -m experiments.tools.selection_lab OUT.csv --only base --only "one summary key"
    python -m experiments.tools.selection_lab OUT.csv --lab "segment=512 stride=8"
    python -m experiments.tools.selection_lab OUT.csv --length 2048 --windows 1 --only base  # a CPU

Windows, texts and measures are those of ``bench=likelihood``, but KL is over the whole vocabulary,
densities are met within half a percent, and nothing is timed. Needs ``make model-smollm2``.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.tools.selection_lab.method import Lab
from experiments.tools.selection_lab.variants import VARIANTS, parse, published
from pbs.methods.base import AttentionMethod

TEXTS = ("debian-handbook", "debian-policy")
# Search for a density: relative error that is good enough, and most steps.
TOLERANCE, MAX_STEPS = 0.005, 10
# Log-odds of knobs.
LOWEST, HIGHEST = -7.0, 9.0


def turned(method: AttentionMethod, log_odds: float) -> AttentionMethod:
    """The method with another value of what is searched."""
    value = 1 / (1 + math.exp(-log_odds))
    if isinstance(method, Lab):
        return replace(method, level=value)
    assert method.knob is not None
    return replace(method, **{**method.knob.fixed, method.knob.name: value})


class Bench:
    """Windows of a real model with their dense predictions, and what a method makes of them."""

    def __init__(self, length: int, windows: int, rope_factor: int, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from experiments.benches.texts import windows_of
        from experiments.cached_models import cache_folder

        path = cache_folder() / "models" / "smollm2"
        config = AutoConfig.from_pretrained(path)
        if rope_factor > 1:
            config.rope_parameters = {
                **config.rope_parameters,
                "rope_type": "yarn",
                "factor": float(rope_factor),
                "original_max_position_embeddings": config.max_position_embeddings,
            }
            config.max_position_embeddings *= rope_factor
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = (
            AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            .to(device)
            .eval()
        )
        self.names: list[str] = []
        self.ids: list[Tensor] = []
        self.dense: list[Tensor] = []
        for text in TEXTS:
            for window in windows_of(text, tokenizer, length=length, count=windows):
                self.names.append(window.name)
                self.ids.append(window.ids.to(device)[None])
                self.dense.append(self.hidden(self.ids[-1])[0])

    @torch.inference_mode()
    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states ``[1, N, width]``."""
        hidden: Tensor = self.model.model(ids).last_hidden_state
        return hidden

    @torch.inference_mode()
    def measure(self, method: AttentionMethod, *, number: int) -> tuple[float, Tensor, float]:
        """Density, KL of every position and mean NLL difference on one window."""
        from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

        ids = self.ids[number]
        with apply_patch_with_prefill(self.model, method) as model:
            sparse = self.hidden(ids)[0]
            density = get_patch(model).report().density
        kl, nll = [], 0.0
        head, step = self.model.lm_head, 2048
        for first in range(0, ids.shape[1] - 1, step):
            some = slice(first, min(first + step, ids.shape[1] - 1))
            wanted, got = (
                head(x[some]).float().log_softmax(dim=-1) for x in (self.dense[number], sparse)
            )
            kl.append((wanted.exp() * (wanted - got)).sum(dim=-1))
            following = ids[0, some.start + 1 : some.stop + 1, None]
            nll += float((wanted - got).gather(1, following).sum())
        return density, torch.cat(kl), nll / (ids.shape[1] - 1)

    @torch.inference_mode()
    def density(self, method: AttentionMethod) -> float:
        """Mean over the first window of each text."""
        from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

        some = range(0, len(self.ids), max(1, len(self.ids) // len(TEXTS)))
        found = []
        for number in some:
            with apply_patch_with_prefill(self.model, method) as model:
                self.hidden(self.ids[number])
                found.append(get_patch(model).report().density)
        return sum(found) / len(found)

    def at_density(self, method: AttentionMethod, target: float) -> AttentionMethod:
        """The method with its knob set for a density, by secants of log density on the log-odds."""
        # What stands for blocks left out costs time, not density.
        searched = replace(method, summaries=0) if isinstance(method, Lab) else method
        low, high, place, slope = LOWEST, HIGHEST, 2.0, 0.5
        before: tuple[float, float] | None = None
        for _ in range(MAX_STEPS):
            got = math.log(self.density(turned(searched, place)) / target)
            if abs(got) < TOLERANCE:
                break
            low, high = (place, high) if got < 0 else (low, place)
            if before is not None and before[0] != place:
                slope = (got - before[1]) / (place - before[0])
            before = place, got
            place = place - got / slope if slope > 0.01 else math.inf
            if not low < place < high:
                place = (low + high) / 2
        return turned(method, place)

    def rows(
        self, variant: str, method: AttentionMethod, targets: list[float]
    ) -> Iterator[dict[str, Any]]:
        """A row for each target density and window."""
        for target in targets:
            if isinstance(method, Lab) and method.rule in ("head", "layer"):
                found: AttentionMethod = replace(method, level=target)
            else:
                found = self.at_density(method, target)
            for number, name in enumerate(self.names):
                density, kl, nll = self.measure(found, number=number)
                bands = {"": kl} | {f"_q{i + 1}": part for i, part in enumerate(kl.chunk(4))}
                yield {
                    "variant": variant,
                    "target": target,
                    "window": name,
                    "density": density,
                    "nll_difference": nll,
                    **{f"kl{band}": float(part.mean()) for band, part in bands.items()},
                    **{f"p99{band}": float(part.quantile(0.99)) for band, part in bands.items()},
                }


def main(arguments: list[str] | None = None) -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.selection_lab")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--rope-factor", type=int, default=1)
    parser.add_argument("--densities", default="0.2")
    parser.add_argument("--only", action="append", help="a variant; default: all")
    parser.add_argument(
        "--lab", action="append", default=[], help='settings of one more, "segment=512 stride=8"'
    )
    given = parser.parse_args(arguments)
    known = {**published(), **VARIANTS}
    wanted = given.only or ([] if given.lab else list(known))
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        parser.error(f"unknown variants {unknown}; known: {', '.join(known)}")
    known |= {settings: parse(settings) for settings in given.lab}
    wanted += given.lab
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(given.length, given.windows, given.rope_factor, device)
    targets = [float(x) for x in given.densities.split(",")]
    with given.out.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for variant in wanted:
            started = time.perf_counter()
            rows = list(bench.rows(variant, known[variant], targets))
            if writer is None:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            took = (time.perf_counter() - started) / len(targets)
            for target, some in groupby(rows, key=itemgetter("target")):
                of_target = list(some)
                kl, density = (
                    sum(float(row[name]) for row in of_target) / len(of_target)
                    for name in ("kl", "density")
                )
                line = f"{variant:52} {target} {density:.4f} {kl:.5f}  {took:.1f} s\n"
                sys.stdout.write(line)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
