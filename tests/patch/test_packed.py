"""Packed sequences are refused in whatever layer attention comes first."""

import warnings

import pytest
import torch

from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill, attention_forward, get_patch
from tests.patch.models import make_hybrid, make_model, positions_of, random_ids

PACKED = torch.cat([torch.arange(100), torch.arange(50)])[None]
IN_ORDER = torch.arange(150)[None]


@pytest.fixture(autouse=True)
def _inference():
    torch._dynamo.reset()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def sparse():
    return build_method("pbs", block_size=16, segment_size=32, threshold=0.3)


def forward(model, positions, mask=None):
    ids = random_ids(positions.shape[0], 150)
    mask = torch.ones_like(ids) if mask is None else mask
    return model(ids, position_ids=positions, attention_mask=mask, use_cache=False)


def refused():
    return pytest.raises(NotImplementedError, match="packed sequences would attend to each other")


@pytest.mark.parametrize("is_patched", [True, False])
def test_a_hybrid_whose_first_layer_is_no_attention_refuses(is_patched):
    model = make_hybrid()
    if is_patched:
        apply_patch_with_prefill(model, sparse())
    else:
        model.set_attn_implementation("pbs")
    forward(model, IN_ORDER)
    with refused():
        forward(model, PACKED)


def test_a_compiled_hybrid_refuses():
    model = apply_patch_with_prefill(make_hybrid(), sparse())
    with refused():
        forward(torch.compile(model, backend="aot_eager"), PACKED)


@pytest.mark.parametrize("make", [lambda: make_model("llama"), make_hybrid])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_positions_that_change_in_place_are_looked_at_again(make, mode):
    model = apply_patch_with_prefill(make(), sparse())
    with torch.inference_mode(False), mode():
        positions = IN_ORDER.clone()
        forward(model, positions)
        positions.copy_(PACKED)
        with refused():
            forward(model, positions)


def test_the_same_positions_under_another_mask_are_looked_at_again():
    model = apply_patch_with_prefill(make_hybrid(), sparse())
    mask = torch.ones(1, 150, dtype=torch.long)
    mask[:, :100] = 0
    positions = positions_of(mask)  # 0 a hundred times, which only padding may do
    forward(model, positions, mask)
    with refused():
        forward(model, positions)


def test_positions_are_read_back_once_per_forward(monkeypatch):
    import pbs.patch.huggingface.refusals as refusals

    read = []
    look = refusals._starts_again
    monkeypatch.setattr(
        refusals, "_starts_again", lambda *arguments: read.append(1) or look(*arguments)
    )
    model = apply_patch_with_prefill(make_model("llama", num_hidden_layers=4), sparse())
    for _ in range(3):
        forward(model, IN_ORDER)
    assert len(read) == 3
    assert get_patch(model).report().sparse_calls == 12


def test_layers_with_positions_of_their_own_are_each_looked_at():
    """Positions moved to another device are another tensor."""

    class Attention(torch.nn.Module):
        is_causal = True

    q, k, v = (torch.randn(1, 2, 150, 16) for _ in range(3))
    layers = [Attention().eval() for _ in range(2)]
    for index, layer in enumerate(layers):
        layer.layer_idx = index
    attention_forward(layers[0], q, k, v, None, position_ids=IN_ORDER.clone())
    with refused():
        attention_forward(layers[1], q, k, v, None, position_ids=PACKED.clone())
