"""Memory of a device: how much there is, how far it rises, and what running out of it looks like.

Importable without hydra and wandb. A "device" is a GPU, or the host for tensors of a CPU.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
# glibc keeps freed memory; resident memory says nothing unless it is made to give it back.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@dataclass
class PeakMemory:
    """Bytes at the fullest moment; None where the system does not tell.

    Attributes:
        num_bytes: above what was in use at the start.
        total_bytes: all, weights and inputs among them; of the host, the whole process.
    """

    num_bytes: int | None = None
    total_bytes: int | None = None


def device_bytes(device: torch.device | str) -> int | None:
    """Memory of a GPU, or what the host has free; None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _read_bytes(Path("/proc/meminfo"), "MemAvailable")


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[PeakMemory]:
    """Measure how far memory rises inside above what is in use at the start.

    On a GPU that is PyTorch's allocator; on Linux it is the process's resident memory, which a
    result that is still alive at the end belongs to as well.
    """
    peak = PeakMemory()
    device = torch.device(device)
    if device.type == "cuda":
        release_memory()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.total_bytes = torch.cuda.max_memory_allocated(device)
        peak.num_bytes = peak.total_bytes - before
        return
    release_memory()
    can_measure = _reset_resident_peak()
    resident = _read_bytes(STATUS, "VmRSS")
    yield peak
    highest = _read_bytes(STATUS, "VmHWM")
    if can_measure and resident is not None and highest is not None:
        peak.total_bytes = highest
        peak.num_bytes = max(0, highest - resident)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the host, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    pattern = r"out of memory|can't allocate memory|not enough memory|cudaErrorMemoryAllocation"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def release_memory(*, collects: bool = False) -> None:
    """Give cached memory back, before measuring or after running out of it.

    Args:
        collects: look for unreachable cycles first, such as those of an exception: takes most of a
            second once transformers is imported.
    """
    if collects:
        gc.collect()
    if _trim is not None:
        _trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def poisoned_memory(device: torch.device | str, num_bytes: int) -> Iterator[None]:
    """Inside, memory nobody has written is NaN: an output with holes cannot pass a check.

    On a CPU ``torch.empty`` fills what it returns. On a GPU that would come with deterministic
    algorithms, which need other memory and time; there blocks of the output's size are filled and
    freed, and PyTorch's allocator hands them out again.

    Args:
        device: where the work runs.
        num_bytes: size of the output.
    """
    if torch.device(device).type == "cuda":
        _poison_free_blocks(torch.device(device), num_bytes)
        yield
        return
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)


def _poison_free_blocks(device: torch.device, num_bytes: int) -> None:
    """Leave a few freed blocks full of bits that are NaN in every floating dtype."""
    blocks = []
    try:
        for _ in range(4):
            blocks.append(torch.full((num_bytes,), -1, dtype=torch.int8, device=device))
    except torch.OutOfMemoryError:
        pass  # so much is in use that less of the free memory can be filled
    blocks.clear()
    torch.cuda.reset_peak_memory_stats(device)


def _reset_resident_peak() -> bool:
    """Let the kernel count the peak of resident memory anew; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_bytes(path: Path, key: str) -> int | None:
    """An entry of a table of Linux, which counts in KiB, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
