"""Arrays recorded from the original implementations (``shared/oracle``, see the README there)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "oracle"
ORACLE = Path(os.environ.get("PBS_ORACLE_DIR", DEFAULT))

needs_oracles = pytest.mark.skipif(
    not ORACLE.is_dir(), reason=f"no recorded oracles in {ORACLE}; set PBS_ORACLE_DIR"
)


def load(name):
    with np.load(ORACLE / f"{name}.npz") as arrays:
        return {
            key: torch.from_numpy(value) if value.ndim else value.item()
            for key, value in arrays.items()
        }


def causal_part(mask):
    """Without the tiles above the diagonal, where the originals leave harmless entries."""
    return mask & torch.ones_like(mask[0, 0]).tril()
