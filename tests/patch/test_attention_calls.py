"""Single calls of the patched attention, and the masks that it gets."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface

from pbs import Geometry, build_method
from pbs.patch.huggingface import (
    PaddingMask,
    apply_patch_with_prefill,
    attention_forward,
    get_patch,
    padding_mask,
)
from tests.patch.models import (
    make_model,
    positions_of,
    random_ids,
)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Attention(torch.nn.Module):
    """Stands for an attention layer in direct calls."""

    layer_idx = 0
    is_causal = True


def call(module=None, mask=None, num_keys=40, num_queries=40, value_dim=16, **kwargs):
    q = torch.randn(2, 4, num_queries, 16)
    k = torch.randn(2, 2, num_keys, 16)
    v = torch.randn(2, 2, num_keys, value_dim)
    return attention_forward(module or Attention().eval(), q, k, v, mask, **kwargs)


def test_direct_call_shape_and_layout():
    out, weights = call()
    assert out.shape == (2, 40, 4, 16)
    assert out.is_contiguous()
    assert weights is None
    assert call(value_dim=8)[0].shape == (2, 40, 4, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"dropout": 0.1}, NotImplementedError, "dropout 0.1"),
        ({"is_causal": False}, NotImplementedError, "not causal"),
        ({"output_attentions": True}, NotImplementedError, "eager"),
        ({"position_bias": torch.zeros(1)}, NotImplementedError, "'position_bias'"),
        ({"indices": torch.zeros(1)}, NotImplementedError, "'indices'"),
        ({"num_queries": 41}, ValueError, "more queries than keys: got 41 and 40"),
        ({"value_dim": 24}, NotImplementedError, "wider than its keys"),
        ({"mask": torch.ones(2, 39)}, ValueError, r"attention mask \[2, 40\]"),
        (
            {"mask": torch.arange(40).expand(2, -1) < 30},
            NotImplementedError,
            "last 10 of 40 keys",
        ),
    ],
)
def test_direct_calls_that_are_refused(kwargs, error, text):
    with pytest.raises(error, match=text):
        call(**kwargs)


def test_a_layer_and_its_mask_must_agree_on_the_window():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=40, q_offset=0, kv_length=40, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="sliding window of 8, its mask for none"):
        call(mask=own, sliding_window=8)
    call(mask=own, sliding_window=40)


def test_a_mask_of_another_forward_is_refused():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=20, q_offset=20, kv_length=40, attention_mask=mask)
    with pytest.raises(ValueError, match="made for 20 queries, got 40"):
        call(mask=own)


def test_a_layer_that_is_not_causal_is_refused():
    module = Attention().eval()
    module.is_causal = False
    with pytest.raises(NotImplementedError, match="Attention is not causal"):
        call(module)


@pytest.mark.parametrize("name", ["bidirectional", "unknown", "chunked", "image"])
def test_masks_that_are_not_plain_causal_are_refused(name):
    from transformers import masking_utils

    function = {
        "bidirectional": getattr(
            masking_utils, "bidirectional_mask_function", lambda b, h, q, k: q >= 0
        ),
        "unknown": lambda b, h, q, k: k <= q,
        "chunked": masking_utils.and_masks(
            masking_utils.causal_mask_function,
            masking_utils.chunked_overlay(16, torch.zeros(1, dtype=torch.long)),
        ),
        "image": masking_utils.or_masks(
            masking_utils.causal_mask_function, lambda b, h, q, k: k < 4
        ),
    }[name]
    with pytest.raises(NotImplementedError, match="this model asks for"):
        padding_mask(1, q_length=40, q_offset=0, kv_length=40, mask_function=function)


def test_nothing_to_mask_is_none():
    ones = torch.ones(2, 40, dtype=torch.bool)
    assert padding_mask(2, q_length=40, q_offset=0, kv_length=40) is None
    assert padding_mask(2, q_length=10, q_offset=30, kv_length=40, attention_mask=ones) is None
    assert padding_mask(2, q_length=1, q_offset=39, kv_length=40, attention_mask=ones) is None
    assert padding_mask(2, cache_position=torch.arange(30, 40), kv_length=40) is None


def test_mask_is_one_row_per_sequence_with_its_geometry():
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :7] = False
    for placement in (
        {"q_length": 10, "q_offset": 30},
        {"q_length": 10, "q_offset": torch.tensor(30)},
        {"cache_position": torch.arange(30, 40)},
    ):
        own = padding_mask(2, kv_length=48, kv_offset=5, attention_mask=mask, **placement)
        assert own.shape == (2, 48)
        assert own.sum(dim=1).tolist() == [35, 33]
        assert own.key_layout.geometry == Geometry(10, 48, 25, (0, 2), (35, 35))
        assert padding_mask(2, kv_length=48, attention_mask=own) is own


def test_decode_mask_holds_padding_window_and_written_slots():
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :17] = False
    own = padding_mask(
        2, q_length=1, q_offset=19, kv_length=32, attention_mask=mask, mask_function=sliding(8)
    )
    assert own.nonzero().tolist() == [[0, s] for s in range(12, 20)] + [
        [1, s] for s in range(17, 20)
    ]


def test_mask_keeps_its_layout_when_moved_and_not_when_changed():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=40, q_offset=0, kv_length=40, attention_mask=mask)
    for same in (own.to("cpu"), own.to(dtype=torch.bool), own.contiguous(), own.clone()):
        assert isinstance(same, PaddingMask)
        assert same.key_layout is own.key_layout
    for other in (own[:, 1:], ~own, own.float(), own & True):
        assert not isinstance(other, PaddingMask)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                # Storage, not shape: an expanded view costs nothing.
                size = item.untyped_storage().nbytes() // max(item.element_size(), 1)
                self.largest = max(self.largest, size)
        return result


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_never_makes_a_square_tensor(padded):
    length = 8192
    model = make_model("llama", num_hidden_layers=1, intermediate_size=64, vocab_size=128)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, : 100 if padded else 0] = 0
    with apply_patch_with_prefill(model, build_method("pbs", block_size=128, segment_size=256)):
        with LargestTensor() as seen:
            model.model(random_ids(1, length), attention_mask=mask, position_ids=positions_of(mask))
        assert get_patch(model).report().num_sparse_layers == 1
    assert seen.largest < length * length // 2


def test_the_registered_mask_function_is_ours():
    assert AttentionMaskInterface()["pbs"] is padding_mask
