"""What a failure says: the reason, what to do about it, and the traceback for whoever looks."""

from __future__ import annotations

import contextlib
import errno
import re
import traceback

from experiments.memory import is_out_of_memory, release_memory
from experiments.settings.credentials import hide

_LONGEST_PATH = 200
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOST_DEVICE = r"CUDA error|CUDA driver|cudaError|NCCL error|device-side assert|no longer available"


def describe_failure(error: BaseException) -> dict[str, str]:
    """Type, message and traceback, as ``metrics.json`` keeps them."""
    return {
        "type": type(error).__name__,
        "message": explain_failure(error),
        "traceback": hide("".join(traceback.format_exception(error))),
    }


def explain_failure(error: BaseException) -> str:
    """The message of an error, and what to do where a resource gave out."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:
        name = str(error.filename or "")
        name = name if len(name) <= _LONGEST_PATH else f"{name[:_LONGEST_PATH]}..."
        text = f"{error.strerror}: {name}" if name else error.strerror
    advice = _advice(error)
    if advice:  # tables and summaries show the first line only
        first, *rest = text.split("\n")
        text = "\n".join([f"{first}; {advice}", *rest])
    return hide(text)


def is_exhausted(error: BaseException) -> bool:
    """Whether memory or disk gave out, or a device: nobody's data are to blame."""
    return bool(_advice(error))


def release_after_failure() -> None:
    """Give memory back, so that a cell that ran out of it does not starve the next one.

    A device that is gone cannot take part in that, which is no failure of its own.
    """
    with contextlib.suppress(RuntimeError):
        release_memory()


def _advice(error: BaseException) -> str:
    if is_out_of_memory(error):
        return (
            "out of memory: try shorter prompts (bench.lengths, bench.max_seq_len), "
            "model.dtype=bfloat16, or more GPUs (model.device_map=auto)"
        )
    if isinstance(error, RuntimeError) and re.search(_LOST_DEVICE, str(error)):
        return (
            "the device failed, and this process cannot use it again: run the same command again, "
            "it continues from the samples on disk"
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            "the disk is full: free some space, or write elsewhere with paths.outputs=DIR; the "
            "same command then continues"
        )
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return "check its permissions, or write elsewhere with paths.outputs=DIR"
    return ""
