"""Gradients are right or refused in one sentence: every method, direct and compiled."""

import pytest
import torch
from torch.autograd import forward_ad

from pbs import AttentionPlan, Geometry, block_sparse_attention, build_method
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build
from tests.ops.attention_truth import causal_mask

ALL = sorted(CASES)
SPARSE = sorted(set(CASES) - {"flash"})
SENTENCE = r"inference_mode\(\).*backend='reference'"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def leaves(num_tokens=300, *, which="qkv", dtype=torch.float32, batch=1, num_queries=None):
    tensors = make_qkv(
        batch, 4, 2, num_tokens, 32, num_queries=num_queries, structure="mixed", dtype=torch.float32
    )
    return [
        tensor.to(dtype).requires_grad_(name in which)
        for name, tensor in zip("qkv", tensors, strict=True)
    ]


def masked_truth(q, k, v, mask):
    """Attention over the pairs of a mask, in fp64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q.double() @ k.double().transpose(-1, -2) * q.shape[3] ** -0.5
    return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v.double()


def gradients(out, tensors):
    """Of a weighted sum, so that no direction cancels."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad((out.double() * weights).sum(), tensors)


def check_gradients(out, truth, tensors):
    for ours, exact in zip(gradients(out, tensors), gradients(truth, tensors), strict=True):
        torch.testing.assert_close(ours, exact, **CLOSE)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "hopper"])
@pytest.mark.parametrize("case", SPARSE)
def test_a_sparse_plan_that_would_need_a_gradient_is_refused(case, backend):
    method = build(case, backend=backend)
    heard = []
    method.recorder = heard.append
    for which in ("q", "k", "v", "qkv"):
        with pytest.raises(NotImplementedError, match=SENTENCE):
            method(*leaves(which=which))
    assert not heard  # nothing ran


@pytest.mark.parametrize("case", SPARSE)
def test_without_grad_mode_the_same_tensors_run(case):
    method, tensors = build(case), leaves()
    plain = [tensor.detach() for tensor in tensors]
    expected = method(*plain)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(method(*tensors), expected)


@pytest.mark.parametrize("case", ALL)
def test_the_reference_has_the_gradients_of_its_plan(case):
    method = build(case, backend="reference")
    tensors = leaves()
    plan = method.plan(*(x.detach() for x in tensors[:2]))
    out = method(*tensors)
    assert out.requires_grad
    check_gradients(out, masked_truth(*tensors, plan.token_mask()), tensors)


@pytest.mark.parametrize("case", ALL)
def test_the_reference_at_the_densest_setting_has_dense_gradients(case):
    method = build(case, densest=True, backend="reference")
    tensors = leaves(150)
    check_gradients(method(*tensors), masked_truth(*tensors, causal_mask(150, 150)), tensors)


def test_the_reference_has_gradients_of_a_padded_batch():
    method = build("pbs", backend="reference")
    tensors = leaves(batch=2)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, :110] = False
    out = method(*tensors, geometry=Geometry.from_padding_mask(mask, num_queries=300))
    ours = torch.autograd.grad(out.square().sum(), tensors)
    alone = [method(*(x[i : i + 1, :, mask[i]] for x in tensors)) for i in range(2)]
    expected = torch.autograd.grad(sum(part.square().sum() for part in alone), tensors)
    for actual, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, exact, **CLOSE)


@pytest.mark.parametrize(
    ("name", "params", "num_queries"),
    [
        ("flash", {}, 300),
        ("flash", {"kernel": "math"}, 300),
        ("flash", {"kernel": "cpu"}, 300),
        ("flash", {}, 200),
        ("flash", {}, 1),
        ("pbs", {"dense_below": 301}, 300),
        ("pbs", {"segment_size": 384}, 300),
        ("minference", {}, 300),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_dense_plans_keep_their_gradients(name, params, num_queries, backend):
    method = build_method(name, backend=backend, **params)
    tensors = leaves(num_queries=num_queries)
    truth = masked_truth(*tensors, causal_mask(num_queries, 300))
    check_gradients(method(*tensors), truth, tensors)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_the_kernels_refuse_on_their_own(backend, which):
    tensors = leaves(which=which)
    plan = build("pbs").plan(*(x.detach() for x in tensors[:2]))
    with pytest.raises(NotImplementedError, match=rf"{which} requires one.*{SENTENCE}"):
        block_sparse_attention(*tensors, plan, backend=backend)
    assert block_sparse_attention(*tensors, plan, backend="reference").requires_grad


def test_a_query_without_keys_has_a_gradient_of_zero():
    tensors = leaves(64)
    grid = build("meanpool").plan(*(x.detach() for x in tensors[:2])).grid
    nothing = torch.zeros(1, 4, grid.num_query_tiles, dtype=torch.int32)
    entries = torch.zeros(1, 4, grid.num_query_tiles, 0, dtype=torch.int32)
    plan = AttentionPlan(grid, 1, 4, entries, nothing, entries, nothing)
    out = block_sparse_attention(*tensors, plan, backend="reference")
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_forward_mode_is_refused_likewise_and_right_in_the_reference():
    q, k, v = leaves(which="")
    direction = torch.randn_like(q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, direction)
        with pytest.raises(NotImplementedError, match=rf"q requires one.*{SENTENCE}"):
            build("pbs")(dual, k, v)
        out = build("pbs", backend="reference")(dual, k, v)
        tangent = forward_ad.unpack_dual(out).tangent
        mask = build("pbs").plan(q, k).token_mask()
        exact = forward_ad.unpack_dual(masked_truth(dual, k, v, mask)).tangent
    torch.testing.assert_close(tangent.double(), exact, **CLOSE)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    """A layer around the method, since a compiled graph is what the method is inside of."""

    @staticmethod
    def layer(method):
        return lambda q, k, v: method(q * 1.5, k, v, layer_idx=0) + 1

    @pytest.mark.parametrize("which", ["q", "v"])
    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_a_sparse_plan_is_refused(self, backend, which):
        fast = torch.compile(self.layer(build("pbs", backend=backend)), backend="aot_eager")
        with pytest.raises(NotImplementedError, match=SENTENCE):
            fast(*leaves(which=which))
        with torch.no_grad():  # what was refused does not stay so
            fast(*leaves(which=which))

    def test_a_graph_made_without_gradients_is_not_used_with_them(self):
        fast = torch.compile(self.layer(build("pbs")), backend="aot_eager")
        with torch.no_grad():
            fast(*leaves())
        with pytest.raises(NotImplementedError, match=SENTENCE):
            fast(*leaves())

    @pytest.mark.parametrize(
        ("case", "changes"), [("flash", {}), ("pbs", {"backend": "reference"})]
    )
    def test_dense_plans_and_the_reference_have_gradients(self, case, changes):
        method, tensors = build(case, **changes), leaves()
        fast = torch.compile(self.layer(method), backend="aot_eager")
        expected = gradients(self.layer(method)(*tensors), tensors)
        for ours, theirs in zip(gradients(fast(*tensors), tensors), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)

    def test_a_whole_graph_says_that_gradients_need_a_break(self):
        fast = torch.compile(self.layer(build("flash")), backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"outside of the compiled graph"):
            fast(*leaves())
