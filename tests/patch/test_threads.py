"""Counts of models and methods that several threads use at once."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch
from tests.patch.models import make_model, random_ids

NUM_THREADS = 4
NUM_CALLS = 25


@pytest.fixture(autouse=True)
def _eager_switches():
    """Threads take turns as often as they can, so that what is not safe fails."""
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(previous)


def method():
    return build_method("pbs", block_size=16, segment_size=32, threshold=0.3)


def run_at_once(models):
    """Each model NUM_CALLS times in a thread of its own, dense and sparse in turn."""
    barrier = Barrier(len(models))

    def run(model):
        ids = random_ids(1, 70)
        barrier.wait()
        with torch.inference_mode():
            for index in range(NUM_CALLS):
                model(ids if index % 2 else ids[:, :20], use_cache=False)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(run, models))


def check_counts(model, num_threads):
    alone = apply_patch_with_prefill(make_model("llama"), method())
    run_at_once([alone])
    for layer, expected in zip(
        get_patch(model).report().layers, get_patch(alone).report().layers, strict=True
    ):
        assert layer.density == pytest.approx(expected.density)
    for layer in get_patch(model).report().layers:
        assert layer.sparse_calls == NUM_CALLS // 2 * num_threads
        num_dense = (NUM_CALLS - NUM_CALLS // 2) * num_threads
        assert layer.dense_calls == {"no more keys than segment_size=32": num_dense}


def test_threads_on_one_model_count_each_call_once():
    model = apply_patch_with_prefill(make_model("llama"), method())
    run_at_once([model] * NUM_THREADS)
    check_counts(model, NUM_THREADS)


def test_models_that_share_a_method_count_their_own_calls():
    shared = method()
    first = make_model("llama")
    models = [apply_patch_with_prefill(copy.deepcopy(first), shared) for _ in range(NUM_THREADS)]
    run_at_once(models)
    for model in models:
        check_counts(model, 1)


def test_the_methods_own_recorder_hears_every_thread():
    shared, heard = method(), []
    shared.recorder = heard.append
    model = apply_patch_with_prefill(make_model("llama"), shared)
    run_at_once([model] * NUM_THREADS)
    assert shared.recorder == heard.append
    assert len(heard) == 2 * NUM_CALLS * NUM_THREADS


def test_a_call_is_heard_by_its_own_recorder_and_the_methods():
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    plain, own, always = method(), [], []
    plain.recorder = always.append
    plain(q, k, v, recorder=own.append, layer_idx=3)
    plain(q, k, v)
    assert [call.layer_idx for call in own] == [3]
    assert [call.layer_idx for call in always] == [3, None]
    assert own[0] is always[0]


def test_a_compiled_call_with_a_recorder_of_its_own_is_heard_in_each_run():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    plain, heard = method(), []
    fast = torch.compile(
        lambda q: plain(q * 2, k, v, recorder=heard.append) + 1, backend="aot_eager"
    )
    for _ in range(2):
        fast(q)
    assert len(heard) == 2
    torch._dynamo.reset()
