"""What the tests of the plug-in share."""

import torch
import transformers

from pbs import build_method
from pbs.patch.huggingface import (
    get_patch,
)

IS_V4 = transformers.__version__.startswith("4.")


# Measured on these models: fp32 rounding, logits of size 1 to 10.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}


def densest():
    """Sparse code path, dense result."""
    return build_method("pbs", block_size=16, segment_size=32, threshold=1.0)


def sparse():
    return build_method("pbs", block_size=16, segment_size=32, threshold=0.3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def layer_calls(model):
    return {layer.layer_idx: layer for layer in get_patch(model).report().layers}
