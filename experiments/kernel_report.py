"""``make kernels``: compiles every Triton kernel for chips that are not here, and checks it.

The real launchers run with their kernels replaced by a recorder, so that what is compiled is what
would be launched: same arguments, same specialisation, same options. Needs Triton alone, no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

ARCHITECTURES = (80, 90, 100)
# Shared memory a block may have, bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ATTENTION = "block_sparse_attention_fwd_kernel"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments and its options."""

    label: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch for one chip."""

    label: str
    kernel: str
    architecture: int
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_wgmma: int
    num_tma: int

    def problems(self) -> list[str]:
        """What must not be: it could not launch, or would miss what the chip is for."""
        found = []
        if self.shared_bytes > SHARED_LIMIT[self.architecture]:
            limit = SHARED_LIMIT[self.architecture]
            found.append(f"{self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if self.kernel == ATTENTION and self.architecture == 90:
            # fp32 runs without matrix units, for checks; wgmma multiplies 64 rows at least.
            is_fp32 = " fp32 " in self.label
            if self.stack_bytes and not is_fp32:
                found.append(f"spills {self.stack_bytes} bytes of registers")
            if not self.num_wgmma and not is_fp32 and not self.label.endswith("B=32"):
                found.append("no wgmma: the matrix units would idle")
        return found


@contextmanager
def recording(label: str, launches: list[Launch], capability: tuple[int, int]) -> Iterator[None]:
    """Inside, launching a kernel records it; tensors pass as if they lay on that chip."""
    from pbs.ops.block_sparse_attention import triton as attention

    real = jit.JITFunction.run, attention._check_interpreter, attention.launch_options

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        launches.append(Launch(label, kernel, arguments, options))

    def options_of(**shape: Any) -> Any:
        return real[2](**{**shape, "capability": capability})

    jit.JITFunction.run = record
    attention._check_interpreter = lambda q: None  # noqa: ARG005
    attention.launch_options = options_of
    try:
        yield
    finally:
        jit.JITFunction.run, attention._check_interpreter, attention.launch_options = real


def launches_for(architecture: int) -> list[Launch]:
    """Every kernel in every configuration that methods launch on this chip."""
    launches: list[Launch] = []
    capability = divmod(architecture, 10)
    for label, launch in cases().items():
        with recording(label, launches, capability):
            launch()
    return launches


def cases() -> dict[str, Callable[[], object]]:
    """Label to a call of the public launcher that reaches the kernel."""
    from pbs import BlockGrid, build_method
    from pbs.ops.antidiagonal import antidiagonal_block_sums
    from pbs.ops.block_selection import select_top_p_blocks
    from pbs.ops.block_sparse_attention import triton as attention
    from pbs.ops.permutation import triton as permutation

    def tensors(head_dim: int, dtype: torch.dtype, heads: int = 4) -> torch.Tensor:
        return torch.randn(1, heads, 600, head_dim).to(dtype)

    def attend(
        method: str, head_dim: int, dtype: torch.dtype, **params: object
    ) -> Callable[[], object]:
        def launch() -> object:
            q, k = tensors(head_dim, dtype), tensors(head_dim, dtype, heads=1)
            plan = build_method(method, **params).plan(q, k)
            return attention.block_sparse_attention(q, k, k, plan, scale=1.0)

        return launch

    found: dict[str, Callable[[], object]] = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for head_dim in (64, 80, 96, 128, 256):
            found[f"attention {name} D={head_dim} B=128"] = attend("pbs", head_dim, dtype)
    for size in (32, 64):
        found[f"attention bf16 D=128 B={size}"] = attend(
            "pbs", 128, torch.bfloat16, block_size=size, segment_size=256
        )
    found["attention bf16 D=128 columns"] = attend(
        "minference", 128, torch.bfloat16, vertical_size=30, slash_size=100
    )
    found["attention bf16 D=128 local window"] = attend(
        "streaming", 128, torch.bfloat16, n_init=64, n_local=256
    )
    found["attention fp32 D=128 B=128"] = attend("pbs", 128, torch.float32)
    for head_dim in (64, 128, 256):
        k = tensors(head_dim, torch.bfloat16)
        order = torch.arange(600).expand(1, 4, -1)
        found[f"key importance bf16 D={head_dim}"] = lambda k=k: _importance(permutation, k)
        found[f"gather bf16 D={head_dim}"] = lambda k=k, o=order: permutation.gather_keys(k, o)
    grid = BlockGrid(600, 600, 128, 128)
    for head_dim, stride in ((128, 8), (128, 16), (64, 8)):
        x = tensors(head_dim, torch.bfloat16)
        found[f"antidiagonal bf16 D={head_dim} s={stride}"] = lambda x=x, s=stride: (
            antidiagonal_block_sums(x, x, stride=s, scale=1.0, grid=grid, backend="triton")
        )
    for segment in (256, 2048):
        scores = torch.rand(1, 4, 4096)
        found[f"sort S={segment}"] = lambda x=scores, s=segment: permutation.sort_segments(
            x, num_keys=4096, segment_size=s
        )
    for num_tiles in (1024, 4096):
        p = torch.rand(1, 1, 1, num_tiles)
        limits = torch.tensor([num_tiles])
        found[f"top-p T={num_tiles}"] = lambda p=p, n=limits: select_top_p_blocks(
            p, threshold=0.9, candidates=n, limits=n, backend="triton"
        )
    return found


def _importance(permutation: Any, k: torch.Tensor) -> None:
    # The second kernel reads what the first, which does not run here, would have written.
    permutation.key_importance(k[:, :, -128:], k, scale=1.0)


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile one recorded launch for a chip.

    The binder and ``_pack_args`` are Triton's own way from arguments to a specialised source
    (checked with Triton 3.6 and 3.7).
    """
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    options = {**launch.options, "debug": False}
    bind = jit.create_function_from_signature(
        launch.kernel.signature, launch.kernel.params, backend
    )
    bound, specialization, bound_options = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, bound_options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    registers, stack = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        launch.label,
        launch.kernel.__name__,
        architecture,
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        registers,
        stack,
        compiled.metadata.shared,
        ptx.count("wgmma.mma_async"),
        ptx.count("cp.async.bulk.tensor"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[-300:]}")
    return int(found[1]), int(found[2])


def main() -> int:
    """Print one line per kernel, configuration and chip; exit status 1 if one has a problem."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it for this report")
    print(f"Triton {triton.__version__}")  # noqa: T201 - the report itself
    header = (
        f"{'configuration':34} {'kernel':34} {'sm':>4} warps stages regs stack  shared wgmma tma"
    )
    print(header)  # noqa: T201
    num_problems = 0
    for architecture in ARCHITECTURES:
        for launch in launches_for(architecture):
            done = compile_launch(launch, architecture)
            line = (
                f"{done.label:34} {done.kernel:34} {architecture:4} {done.num_warps:5} "
                f"{done.num_stages:6} {done.registers:4} {done.stack_bytes:5} "
                f"{done.shared_bytes:7} {done.num_wgmma:5} {done.num_tma:3}"
            )
            problems = done.problems()
            num_problems += len(problems)
            print(line + "".join(f"  PROBLEM: {text}" for text in problems), flush=True)  # noqa: T201
    print(f"{num_problems} problems")  # noqa: T201
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
