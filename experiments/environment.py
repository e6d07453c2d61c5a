"""What a result was measured with: packages, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Not from experiments.config: machines with a GPU may have no hydra.
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "pandas",
    "scipy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "opencompass",
    "flash-attn",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
)


def describe_environment() -> dict[str, Any]:
    """Packages, device, driver, threads, commit and time. No names of hosts, users or folders."""
    # PBS_COMMIT: which files these are, where the repository is not at hand or is another.
    named = os.environ.get("PBS_COMMIT")
    commit = named or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "num_threads": torch.get_num_threads(),
        "device": device_name(),
        "num_gpus": torch.cuda.device_count(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if torch.cuda.is_available()
        else None,
        "cuda": torch.version.cuda,
        "commit": commit,
        "is_dirty": bool(changes) if commit and not named else None,
    }


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if torch.cuda.is_available():
        try:
            return torch.cuda.get_device_name()
        except RuntimeError as error:  # a device that is gone; what fails on it says the rest
            return f"a GPU that does not answer ({str(error).splitlines()[0]})"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line of a command's output; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None
