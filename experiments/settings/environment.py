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

# Not from experiments.settings.config: machines with a GPU may have no hydra.
from experiments.content import ROOT, digests_of, source_digest
from experiments.run_environments import environment_id
from pbs.methods import crossover
from pbs.ops.block_sparse_attention import tuned

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
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
    "wonderwords",
)
# Variables that change results or times. Those that name a file stand in env.json as its content:
# PBS_CROSSOVER and PBS_LAUNCH_OPTIONS.
VARIABLES = (
    *("OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY"),
    *("KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_CBWR", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    *("TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF"),
)


def describe_environment() -> dict[str, Any]:
    """What a result was measured with. No names of hosts, users or folders.

    Packages, device, driver, threads, variables, commit and time; the digest of the project's own
    source (``source``); the measured launch options (``launch_options``) and crossovers
    (``crossover``) that kernels and methods read; and ``id``, which names all of these but commit
    and time and stands in every sample.
    """
    # PBS_COMMIT: which files these are, where the repository is not at hand or is another.
    named = os.environ.get("PBS_COMMIT")
    commit = named or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain")
    environment = {
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
        "source": source_digest(),
        "launch_options": describe_launch_options(),
        "crossover": describe_crossover(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return {**environment, "id": environment_id(environment)}


def describe_launch_options() -> dict[str, Any] | None:
    """The digest of the measured launch options and those of this device; None without a table.

    A table that cannot be read stands there as its error: kernels that need it fail with it.
    """
    path = tuned.table_path()
    if not path.is_file():
        return None
    facts: dict[str, Any] = digests_of({"digest": path})
    try:
        table = tuned.read_table(path)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        own = {key: entry for key, entry in table.items() if key.partition(" | ")[0] == device}
        return {**facts, "num_entries": len(table), "of_this_device": own}
    except (ValueError, AttributeError, OSError, RuntimeError) as error:
        return {**facts, "error": f"{type(error).__name__}: {error}"}


def describe_crossover() -> dict[str, str | None]:
    """Digests of the tables of crossover lengths: the packaged one, and that of PBS_CROSSOVER."""
    own = os.environ.get(crossover.VARIABLE)
    tables = {"packaged": crossover.PACKAGED} | ({crossover.VARIABLE: Path(own)} if own else {})
    return {crossover.VARIABLE: None, **digests_of(tables)}


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
