"""One call of PBS between the marks of a profiler, at 131072 tokens and the paper's density.

    ncu --profile-from-start off --clock-control none --kernel-name-base function \\
        --section SpeedOfLight --section ComputeWorkloadAnalysis --section LaunchStats \\
        --section Occupancy python -m experiments.tools.profile_call

Everything is compiled and warm before the marks. Needs no hydra and no wandb.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

from experiments.timing.cost_model import Shape
from experiments.timing.densities import ControlledDensity
from experiments.timing.inputs import Cell, draw_inputs
from experiments.timing.published import density_at
from pbs import build_method


def main(arguments: list[str] | None = None) -> None:
    """Call twice; profile the second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--shape", default="32/8/128", help="query heads/key heads/head dim")
    parser.add_argument("--gqa", default="shared", choices=("shared", "per_query_head"))
    parser.add_argument("--device", default="cuda", help="cpu: tries the script, without marks")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device to profile; --device cpu tries the script")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = Shape.parse(options.shape, element_size=dtype.itemsize)
    density, _ = density_at(options.length)
    cell = Cell(shape, options.length, dtype, device, "random", density)
    ((q, k, v),) = draw_inputs(cell)
    method = ControlledDensity(method=build_method("pbs", gqa=options.gqa), target_density=density)
    with torch.inference_mode():
        method(q, k, v)
        with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
            method(q, k, v)


if __name__ == "__main__":
    main()
