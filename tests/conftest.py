"""Fixtures and switches of all tests."""

import os

# The interpreter must be chosen before a kernel module is imported. Tests marked `gpu` run without.
if "gpu" not in os.environ.get("PBS_TESTS", ""):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start share the cores with xdist's workers: more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs in this process, where torch is loaded first, and in those are then of one environment.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# No test reaches a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Small tensors: more threads only wait for each other, and xdist has one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Fill torch.empty with NaN, so that an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
