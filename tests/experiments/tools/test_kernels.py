"""Kernels compile for sm_90 as they are launched, and the report calls a problem a problem."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from experiments.tools.kernels import SHARED_LIMIT, Compiled

GOOD = Compiled(
    label="attention bf16 D=128 B=128",
    kernel="block_sparse_attention_fwd_kernel",
    architecture=90,
    num_warps=8,
    num_stages=2,
    registers=246,
    stack_bytes=0,
    shared_bytes=164_864,
    num_wgmma=32,
    num_tma=8,
)


def run(project, *words):
    """Run Python without Triton's interpreter, which the tests themselves have."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )


def report(project, *words):
    return run(project, "-m", "experiments.tools.kernels", *words)


def test_every_kernel_compiles_for_an_h100_without_problems(project):
    # fp16 attention compiles as bf16 does; `make kernels` has it, and the other chips.
    done = report(project, "--sm", "90", "--skip", "attention fp16", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 problems")
    head_dims = [line for line in done.stdout.splitlines() if line.startswith("attention bf16 D=")]
    assert len(head_dims) >= 5
    assert all(" 90 " in line for line in head_dims)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack_bytes": 32}, "spills 32 bytes"),
        ({"num_wgmma": 0}, "no wgmma"),
        ({"shared_bytes": SHARED_LIMIT[90] + 1}, "shared memory"),
        ({"shared_bytes": 262_840, "kernel": "gather_keys_kernel"}, "shared memory"),
    ],
    ids=["spill", "no-wgmma", "shared", "shared-of-any-kernel"],
)
def test_what_would_not_launch_or_be_slow_is_a_problem(change, problem):
    (found,) = replace(GOOD, **change).problems()
    assert problem in found
    assert f"PROBLEM: {found}" in replace(GOOD, **change).line()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"architecture": 80, "num_wgmma": 0, "stack_bytes": 8},
        {"label": "attention fp32 D=128 B=128", "num_wgmma": 0, "stack_bytes": 2176},
        {"label": "attention bf16 D=128 B=32", "num_wgmma": 0},
        {"kernel": "gather_keys_kernel", "num_wgmma": 0},
    ],
    ids=["good", "sm_80", "fp32", "tiles-too-small", "no-products"],
)
def test_what_is_as_it_must_be_is_none(change):
    assert replace(GOOD, **change).problems() == []


def test_a_report_of_nothing_is_refused(project):
    done = report(project, "--sm", "90", "--only", "flashier")
    assert done.returncode == 2
    assert "no case starts with 'flashier'" in done.stderr


def test_every_configuration_of_an_autotuned_kernel_is_recorded_and_none_forgotten(
    project, tmp_path
):
    code = """
import torch, triton, triton.language as tl
from experiments.tools import kernels as kernel_report
import pbs.ops.permutation.triton as module

@triton.autotune([triton.Config({"B": 32}), triton.Config({"B": 64}, num_warps=8)], key=[])
@triton.jit
def made_up_kernel(x_ptr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, B), 0.0)

made_up_kernel.fn.__module__ = module.__name__
made_up_kernel.fn.__name__ = "made_up_kernel"
module.made_up_kernel = made_up_kernel
assert "made_up_kernel" in kernel_report.kernel_names()
launches = []
with kernel_report.recording("made up", launches, (9, 0)):
    made_up_kernel[(1,)](torch.zeros(64))
assert [one.label for one in launches] == ["made up, config 0", "made up, config 1"]
found = [kernel_report.compile_launch(one, 90) for one in launches]
assert [one.num_warps for one in found] == [4, 8]
"""
    script = tmp_path / "made_up.py"  # Triton reads a kernel's source from its file
    script.write_text(code)
    done = run(project, str(script))
    assert done.returncode == 0, done.stderr
