"""Gradients and autocast on a CUDA device: ``make test-gpu``."""

import threading

import pytest
import torch

from pbs import block_sparse_attention, build_method
from pbs.ops.dense import DENSE_KERNELS, choose_dense_kernel, dense_attention
from pbs.testing import make_qkv
from tests.methods.cases import build
from tests.ops.attention_truth import causal_mask

pytestmark = pytest.mark.gpu
SENTENCE = r"inference_mode\(\).*backend='reference'"


def leaves(dtype, *, num_keys=600, num_queries=None, which="qkv", head_dim=64):
    tensors = make_qkv(
        1, 8, 2, num_keys, head_dim, num_queries=num_queries, structure="mixed", dtype=dtype
    )
    return [x.cuda().requires_grad_(name in which) for name, x in zip("qkv", tensors, strict=True)]


def truth(q, k, v, mask):
    """Attention over the pairs of a mask, in fp64."""
    k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
    logits = q.double() @ k.double().transpose(-1, -2) * q.shape[3] ** -0.5
    return logits.masked_fill(~mask.to(q.device), float("-inf")).softmax(dim=-1) @ v.double()


def gradients(out, tensors):
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    needed = [x for x in tensors if x.requires_grad]
    return torch.autograd.grad((out.double() * weights.view(out.shape)).sum(), needed)


def check_gradients(out, exact, tensors):
    eps = torch.finfo(tensors[0].dtype).eps
    for ours, wanted in zip(gradients(out, tensors), gradients(exact, tensors), strict=True):
        error = (ours.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 16 * eps


@pytest.mark.parametrize("backend", ["auto", "triton", "hopper"])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_sparse_kernels_refuse_a_gradient(backend, which):
    tensors = leaves(torch.bfloat16, which=which)
    with pytest.raises(NotImplementedError, match=SENTENCE):
        build_method("pbs", threshold=0.5, backend=backend)(*tensors)


@pytest.mark.parametrize("case", ["pbs", "minference", "streaming"])
def test_the_reference_has_the_gradients_of_its_plan(case):
    tensors = leaves(torch.float32)
    method = build(case, backend="reference")
    plan = method.plan(*(x.detach() for x in tensors[:2]))
    check_gradients(method(*tensors), truth(*tensors, plan.token_mask()), tensors)


@pytest.mark.parametrize("kernel", sorted(set(DENSE_KERNELS) - {"cpu"}))
@pytest.mark.parametrize("num_queries", [600, 200, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["qkv", "q", "k", "v"])
def test_dense_kernels_have_gradients(kernel, num_queries, dtype, which):
    tensors = leaves(dtype, num_queries=num_queries, which=which)
    try:
        choose_dense_kernel(kernel, *tensors)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))
    out = dense_attention(*tensors, scale=64**-0.5, kernel=kernel)
    check_gradients(out, truth(*tensors, causal_mask(num_queries, 600)), tensors)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_leaves_a_method_as_it_is(backend):
    q, k, v = leaves(torch.float32, which="")
    method = build("pbs", backend=backend)
    plan = method.plan(q, k)

    def outputs():
        yield method(q, k, v)
        yield block_sparse_attention(q, k, v, plan, backend=backend)
        yield dense_attention(q, k, v, scale=0.1)

    expected = list(outputs())
    with torch.autocast("cuda", torch.bfloat16):
        for out, wanted in zip(outputs(), expected, strict=True):
            assert torch.equal(out, wanted)


def test_threads_count_each_call_once():
    pytest.importorskip("transformers")
    from pbs.patch.huggingface import apply_patch_with_prefill, get_patch
    from tests.patch.models import make_model, random_ids

    model = make_model("llama").to("cuda", torch.bfloat16)
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.3)
    apply_patch_with_prefill(model, method)
    ids = random_ids(1, 200).cuda()

    def run():
        with torch.inference_mode():
            for _ in range(25):
                model(ids, use_cache=False)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [layer.sparse_calls for layer in get_patch(model).report().layers] == [100, 100]
