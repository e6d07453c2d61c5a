"""Tensors as no test makes them: odd strides, no elements, nothing but padding."""

import pytest
import torch

from experiments.settings.config import ROOT
from pbs.methods import build_method
from pbs.ops.grid import Geometry
from pbs.patch.huggingface import apply_patch_with_prefill
from tests.methods.cases import CASES, build
from tests.reliability.messages import check_raised

NUM_TOKENS = 200
# Ways to hold the same numbers in memory.
VIEWS = {
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dims first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "part of wider dims": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[3]],
    "every other dim": lambda t: torch.stack([t, t * 9], -1).flatten(-2)[..., ::2],
    "every other row": lambda t: torch.stack([t, t * 9], 3).flatten(2, 3)[:, :, ::2],
    "odd offset": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
    "with gradient": lambda t: t.clone().requires_grad_(),
}
# The same memory for several entries.
BROADCAST = {
    "one sequence": lambda t: t[:1].expand(2, -1, -1, -1),
    "one row": lambda t: t[:, :, :1].expand(-1, -1, t.shape[2], -1),
    "one dim": lambda t: t[..., :1].expand(-1, -1, -1, t.shape[3]),
}


def inputs(num_tokens=NUM_TOKENS, dim=32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, num_tokens), (2, num_tokens), (2, num_tokens))
    return [torch.randn(2, *size, dim, generator=generator) for size in sizes]


@pytest.mark.parametrize("name", CASES)
def test_strides_change_no_number(name):
    method = build(name)
    for view in (*VIEWS.values(), *BROADCAST.values()):
        q, k, v = (view(tensor) for tensor in inputs())
        plain = (
            tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (q, k, v)
        )
        with torch.no_grad():
            out = method(q, k, v)
        torch.testing.assert_close(out, method(*plain), rtol=1e-5, atol=1e-5)


SHAPES = {
    "no queries": lambda q, k, v: (q[:, :, :0], k, v),
    "no tokens": lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]),
    "no sequences": lambda q, k, v: (q[:0], k[:0], v[:0]),
    "no heads": lambda q, k, v: (q[:, :0], k, v),
    "no key heads": lambda q, k, v: (q, k[:, :0], v[:, :0]),
    "no dims": lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]),
    "more queries than keys": lambda q, k, v: (q, k[:, :, :100], v[:, :, :100]),
    "fewer values": lambda q, k, v: (q, k, v[:, :, :100]),
    "no batch": lambda q, k, v: (q[0], k[0], v[0]),
    "one dimension more": lambda q, k, v: (q[None], k[None], v[None]),
    "odd heads": lambda q, k, v: (q[:, :3], k, v),
    "other batch": lambda q, k, v: (q, k[:1], v[:1]),
    "other dims": lambda q, k, v: (q, k[..., :16], v[..., :16]),
    "narrow values": lambda q, k, v: (q, k, v[..., :16]),
    "integers": lambda q, k, v: (q.int(), k.int(), v.int()),
    "truth values": lambda q, k, v: (q > 0, k > 0, v > 0),
    "other dtype": lambda q, k, v: (q, k.half(), v),
    "other device": lambda q, k, v: (q.to("meta"), k, v),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_that_nothing_can_be_computed_on_are_refused(name):
    method = build(name)
    for change in SHAPES.values():
        with pytest.raises((ValueError, TypeError)) as caught:
            method(*change(*inputs()))
        check_raised(caught.value)


MASKS = {
    "a row of padding": ([1] * NUM_TOKENS, [0] * NUM_TOKENS),
    "nothing but padding": ([0] * NUM_TOKENS, [0] * NUM_TOKENS),
    "one token, last": ([0] * (NUM_TOKENS - 1) + [1], [1] * NUM_TOKENS),
    "one token, first": ([1] + [0] * (NUM_TOKENS - 1), [1] * NUM_TOKENS),
    "padding before": ([0] * 150 + [1] * 50, [0] * 7 + [1] * 193),
    "padding after": ([1] * 50 + [0] * 150, [1] * 193 + [0] * 7),
}


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_no_number_and_gives_zeros(name):
    method = build(name)
    for mask in MASKS.values():
        mask = torch.tensor(mask)
        padding = (mask == 0)[:, None, :, None]
        q, k, v = (tensor.masked_fill(padding, float("nan")) for tensor in inputs())
        geometry = Geometry.from_padding_mask(mask, num_queries=NUM_TOKENS)
        out = method(q, k, v, geometry=geometry)
        assert not out.masked_fill(~padding, 0).any()
        for row, real in enumerate(mask):
            tokens = real.nonzero()[:, 0]
            if len(tokens):
                alone = method(*(tensor[row : row + 1][:, :, tokens] for tensor in (q, k, v)))
                together = out[row : row + 1][:, :, tokens]
                torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    path = ROOT / "experiments" / "tiny"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def patched(model):
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.7)
    with apply_patch_with_prefill(model, method) as patched, torch.inference_mode():
        yield patched


IDS = torch.randint(3, 60, (2, 100), generator=torch.Generator().manual_seed(0))
WHOLE = torch.ones(2, 100, dtype=torch.long)


def test_a_row_of_padding_leaves_the_others_as_they_are(patched):
    mask = WHOLE.clone()
    mask[1] = 0
    logits = patched(input_ids=IDS, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1], patched(input_ids=IDS[:1]).logits)
    assert patched(input_ids=IDS, attention_mask=WHOLE * 0).logits.isfinite().all()
    tokens = patched.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    assert tokens.shape == (2, 102)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (WHOLE[:, :50], "attention_mask has 50 tokens, the cache and the input have 100"),
        (torch.ones(3, 100), "attention_mask has 3 sequences, the input has 2"),
        (WHOLE[0], "pass 1 for real tokens and 0 for padding"),
        (WHOLE[:, None], "pass 1 for real tokens and 0 for padding"),
        (torch.ones(2, 1, 100, 100), "Pass a padding mask [Z, N]"),
        (torch.tensor([[1, 0] * 50, [1] * 100]), "padding between real tokens"),
    ],
    ids=["short", "batch", "1d", "3d", "4d", "holes"],
)
def test_masks_that_mean_something_else_are_refused(patched, mask, message):
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        patched(input_ids=IDS, attention_mask=mask)
    check_raised(caught.value, message)


def test_a_mask_for_the_new_token_alone_is_refused(patched):
    out = patched(input_ids=IDS, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask has 1 tokens, the cache"):
        patched(
            input_ids=IDS[:, :1],
            attention_mask=WHOLE[:, :1],
            past_key_values=out.past_key_values,
        )


def test_the_number_of_cases():
    num_cases = len(CASES) * (len(VIEWS) + len(BROADCAST) + len(SHAPES) + len(MASKS)) + 9
    print(f"tensors tried: {num_cases}")
    assert num_cases >= 300


NO_SCALES = [0, -1.0, float("nan"), float("inf"), True, "0.1", torch.tensor(0.1)]


@pytest.mark.parametrize("name", CASES)
def test_a_scale_that_is_no_positive_number_is_refused(name):
    for scale in NO_SCALES:
        with pytest.raises(ValueError, match="must be a positive number, got"):
            build(name)(*inputs(), scale=scale)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_dense_tensor_is_refused(name):
    q, k, v = inputs()
    for broken in (None, q.tolist(), q.numpy(), q.to_sparse()):
        with pytest.raises(TypeError, match="expected q as a dense torch tensor, got"):
            build(name)(broken, k, v)
    with pytest.raises(TypeError, match="no values to attend to"):
        build(name)(*(x.to("meta") for x in (q, k, v)))


def test_a_geometry_that_does_not_fit_is_refused_even_if_nothing_is_padded():
    method = build_method("pbs")
    with pytest.raises(ValueError, match="the geometry is for"):
        method(*inputs(), geometry=Geometry.unpadded(2, 100, 100))
    with pytest.raises(TypeError, match=r"expected geometry as a pbs\.Geometry, got Tensor"):
        method(*inputs(), geometry=torch.ones(2, NUM_TOKENS))
