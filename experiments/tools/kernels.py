"""``make kernels``: compiles every Triton kernel for chips that are not here, and checks it.

The real launchers run with their kernels replaced by a recorder, so that what is compiled is what
would be launched: same arguments, same specialisation, same options, every configuration of an
autotuned kernel. Needs Triton and torch alone, no GPU; checked with Triton 3.6 and 3.7.

    python -m experiments.tools.kernels [--sm 90] [--only gather] [--skip attention] [--jobs 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit
from triton.runtime.autotuner import Autotuner

from experiments.tools.kernel_cases import cases, kernel_modules, kernel_names

ARCHITECTURES = (80, 90, 100)
# Shared memory a block may have, bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Kernels with this in their name multiply on the matrix units and keep accumulators in registers.
ATTENTION = "attention"


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
        if ATTENTION in self.kernel and self.architecture == 90:
            # fp32 runs without matrix units, for checks; wgmma multiplies 64 rows at least.
            is_fp32 = " fp32 " in self.label
            if self.stack_bytes and not is_fp32:
                found.append(f"spills {self.stack_bytes} bytes of registers")
            if not self.num_wgmma and not is_fp32 and not self.label.endswith("B=32"):
                found.append("no wgmma: the matrix units would idle")
        return found

    def line(self) -> str:
        """One row of the report."""
        return (
            f"{self.label:34} {self.kernel:34} {self.architecture:4} {self.num_warps:5} "
            f"{self.num_stages:6} {self.registers:4} {self.stack_bytes:5} {self.shared_bytes:7} "
            f"{self.num_wgmma:5} {self.num_tma:3}"
            + "".join(f"  PROBLEM: {text}" for text in self.problems())
        )


HEADER = f"{'configuration':34} {'kernel':34}   sm warps stages regs stack  shared wgmma tma"


@contextmanager
def recording(label: str, launches: list[Launch], capability: tuple[int, int]) -> Iterator[None]:
    """Inside, launching a kernel records it; tensors pass as if they lay on that chip.

    What a launcher asks about the chip goes through a function with the argument ``capability``,
    and what refuses tensors of a CPU is called ``_check_interpreter``: both are replaced in all
    modules with kernels.
    """

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        launches.append(Launch(label, kernel, arguments, options))

    def record_each(tuner: Any, *arguments: Any, **options: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        for number, config in enumerate(tuner.prune_configs(options)):
            tuner.fn.run(*arguments, **options, **config.all_kwargs())
            name = f"{label}, config {number}"
            launches[-1] = Launch(name, *_parts(launches[-1]))

    with ExitStack() as stack:
        stack.enter_context(patch.object(jit.JITFunction, "run", record))
        stack.enter_context(patch.object(Autotuner, "run", record_each))
        for module in kernel_modules():
            for name, value in list(vars(module).items()):
                if name == "_check_interpreter":
                    stack.enter_context(patch.object(module, name, _accept))
                elif _asks_for_capability(value):
                    forced = _with_capability(value, capability)
                    stack.enter_context(patch.object(module, name, forced))
        yield


def _parts(launch: Launch) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return launch.kernel, launch.arguments, launch.options


def _accept(*_: object) -> None:
    """Stands for a check of the device."""


def _asks_for_capability(value: object) -> bool:
    is_function = callable(value) and hasattr(value, "__code__")
    return is_function and "capability" in signature(value).parameters


def _with_capability(
    function: Callable[..., Any], capability: tuple[int, int]
) -> Callable[..., Any]:
    def ask(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **{**options, "capability": capability})

    return ask


def chips_of(label: str) -> tuple[int, ...]:
    """The chips that a case is for: one kernel multiplies eight bits, and what is for it."""
    return (90,) if " fp8 " in label else ARCHITECTURES


def launches_for(architecture: int) -> list[Launch]:
    """Every kernel in every configuration that methods launch on this chip."""
    launches: list[Launch] = []
    capability = divmod(architecture, 10)
    for label, launch in cases().items():
        if architecture not in chips_of(label):
            continue
        with recording(label, launches, capability):
            launch()
    return launches


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compile one recorded launch for a chip.

    The binder and ``_pack_args`` are Triton's own way from arguments to a specialised source.
    """
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    options = {**launch.options, "debug": False}
    bind = jit.create_function_from_signature(
        launch.kernel.signature, launch.kernel.params, backend
    )
    bound, specialization, bound_options = bind(*launch.arguments, **options)
    parsed, types, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, bound_options
    )
    source = _source_class(launch.kernel)(launch.kernel, types, constants, attributes)
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


def _source_class(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


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


# Launches hold kernels, which do not pickle: worker processes inherit them by being forked.
_work: list[tuple[Launch, int]] = []


def _compile_number(index: int) -> Compiled:
    return compile_launch(*_work[index])


def compile_all(work: Sequence[tuple[Launch, int]], *, jobs: int) -> Iterator[Compiled]:
    """Compile launches for chips, in their order, over some processes."""
    _work[:] = work
    if jobs == 1:
        yield from map(_compile_number, range(len(work)))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile_number, range(len(work)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per kernel, configuration and chip; exit status 1 if one has a problem."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it for this report")
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.kernels")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose label starts so")
    parser.add_argument("--skip", help="leave out cases whose label starts so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    _say(f"Triton {triton.__version__}")
    launches = {sm: launches_for(sm) for sm in ARCHITECTURES}
    work = [
        (one, sm)
        for sm in options.sm
        for one in launches[sm]
        if one.label.startswith(options.only)
        and not (options.skip and one.label.startswith(options.skip))
    ]
    if not work:
        parser.error(f"no case starts with {options.only!r}; there are: {', '.join(cases())}")
    num_problems = 0
    _say(HEADER)
    for done in compile_all(work, jobs=options.jobs):
        num_problems += len(done.problems())
        _say(done.line())
    reached = {one.kernel.__name__ for found in launches.values() for one in found}
    for name in sorted(kernel_names() - reached):
        num_problems += 1
        _say(f"{name}  PROBLEM: no case launches it; add one to experiments/tools/kernel_cases.py")
    _say(f"{num_problems} problems")
    return 1 if num_problems else 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    sys.exit(main())
