"""Patched models that are copied, pickled, saved and sent to other processes."""

import copy
import io
import pickle
import warnings

import pytest
import torch

from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch, remove_patch
from tests.methods.cases import CASES, build
from tests.patch.models import make_model, random_ids
from tests.patch.test_huggingface import close

LENGTH = 150


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def patched(**params):
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.3, **params)
    return apply_patch_with_prefill(make_model("llama", attention="sdpa"), method, skip_layers=[1])


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle-2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": by_torch,
    "copy of a copy": lambda model: by_torch(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_computes_counts_and_is_restored_on_its_own(make):
    model, ids = patched(), random_ids(1, LENGTH)
    expected = model(ids).logits
    other = make(model)
    assert get_patch(other).report() == get_patch(model).report()
    assert get_patch(other).method == get_patch(model).method
    assert get_patch(other).method is not get_patch(model).method
    close(other(ids).logits, expected)
    assert get_patch(other).report().sparse_calls == 2
    assert get_patch(model).report().sparse_calls == 1
    model_class = type(make_model("llama"))
    assert isinstance(other, model_class)
    with other as entered:
        assert entered is other
    assert type(other) is model_class
    assert other.config._attn_implementation == "sdpa"
    assert not any("_pbs_layer" in vars(module) for module in other.modules())
    assert model.config._attn_implementation == "pbs"
    remove_patch(model)
    close(other(ids).logits, model(ids).logits)


def test_a_copy_after_remove_patch_is_an_ordinary_model():
    model = remove_patch(patched())
    assert b"pbs" not in pickle.dumps(model.config)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def run_in_child(model, ids, queue):
    """What the child process computes, and counts."""
    with torch.no_grad():
        logits = model(ids).logits
    queue.put((logits.numpy().tobytes(), get_patch(model).report()))


def test_a_spawned_process_gets_a_patched_model():
    model, ids = patched(), random_ids(1, LENGTH)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=run_in_child, args=(model, ids, queue))
    child.start()
    logits, report = queue.get()
    child.join()
    assert child.exitcode == 0
    assert report.sparse_calls == 1
    assert get_patch(model).report().sparse_calls == 0
    assert logits == model(ids).logits.numpy().tobytes()


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_method_can_be_pickled(case):
    method = build(case)
    other = pickle.loads(pickle.dumps(method))
    assert other == method
    q, k, v = (torch.randn(1, heads, LENGTH, 32) for heads in (4, 2, 2))
    assert torch.equal(other(q, k, v), method(q, k, v))


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, COPIES["pickle"]])
def test_a_copied_method_has_no_recorder(make):
    method, heard = build("pbs"), []
    method.recorder = lambda call: heard.append(call)
    other = make(method)
    assert other == method
    assert other.recorder is None
    assert method.recorder is not None


def test_a_model_whose_method_has_a_recorder_can_be_saved():
    model, heard = patched(), []
    get_patch(model).method.recorder = lambda call: heard.append(call)
    other = by_torch(model)
    other(random_ids(1, LENGTH))
    assert not heard


def test_a_compiled_models_layers_can_be_saved():
    torch._dynamo.reset()
    model, ids = patched(), random_ids(1, LENGTH)
    expected = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
    other = by_torch(model)
    close(torch.compile(other, backend="aot_eager")(ids, use_cache=False).logits, expected)
    assert get_patch(other).report().sparse_calls == 2
    torch._dynamo.reset()
