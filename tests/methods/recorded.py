"""Arrays recorded from the original implementations: tests/data/oracle, see the README there."""

import os
from pathlib import Path

import numpy as np
import torch

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "oracle"
# All of them, where they are; the small ones come with the repository.
ORACLE = Path(os.environ.get("PBS_ORACLE_DIR", DEFAULT))
SMALL = Path(__file__).resolve().parents[1] / "data" / "oracle"


def recordings(small, large):
    """Names of the recordings there are."""
    return [*small, *(large if ORACLE.is_dir() else ())]


def load(name):
    with np.load((SMALL if name.startswith("small") else ORACLE) / f"{name}.npz") as arrays:
        return {
            key: torch.from_numpy(value) if value.ndim else value.item()
            for key, value in arrays.items()
        }


def causal_part(mask):
    """Without the tiles above the diagonal, where the originals leave harmless entries."""
    return mask & torch.ones_like(mask[0, 0]).tril()
