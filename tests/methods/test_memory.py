"""Selection takes memory that grows with N and T², not with N². Linux only."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from pbs import build_method
from pbs.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32768, 8, 2, 64
MIB = 1 << 20
# Method, settings, and by how many MiB resident memory may grow over one plan, the plan included.
# Hq T² in fp32 are 2 MiB here, the queries 64 MiB, the keys 16 MiB and in plan order 64; all
# [Hq, B, N] probabilities would be 128 MiB, the logits of XAttention's groups 512 MiB, all of
# attention 32 GiB.
BOUNDS = [
    ("flash", {}, 16),
    ("streaming", {}, 16),
    ("random_blocks", {}, 16),
    ("meanpool", {}, 32),
    ("prism", {}, 32),
    ("flexprefill", {}, 128),  # 32 MiB of the last queries' probabilities at a time
    ("flexprefill", {"tau": 1.0}, 128),
    ("xattention", {}, 256),  # 64 MiB of group logits at a time, and the keys once per query head
    ("xattention", {"stride": 16}, 256),
    ("minference", {}, 192),  # the plan: windows and columns of every tile and head
    ("minference", {"preset": "llama31-v2"}, 192),
    ("minference", {"preset": "adaptive", "adaptive_budget": 0.3}, 192),
    ("pbs", {}, 192),  # the keys in plan order, once per query head
    ("pbs", {"gqa": "shared"}, 64),
    ("pbs", {"order": "random"}, 192),
    ("pbs", {"order": "random_query"}, 192),
    ("pbs", {"order": "avg_query"}, 192),
    ("pbs", {"order": "greedy"}, 192),
    ("pbs", {"order": "adaptive"}, 320),  # the keys in both orders
    ("pbs", {"target": "keys_then_queries"}, 320),  # and the queries moved
    ("pbs", {"selector": "maxpool"}, 192),
    ("pbs", {"selector": "low_band"}, 192),
    ("pbs_plus", {}, 320),
    ("pbs_calibrated", {}, 192),  # logits of the spread queries, and the keys in plan order
]
LABELS = [
    " ".join([name, *(f"{k}={v}" for k, v in settings.items())]) for name, settings, _ in BOUNDS
]


def measure(method, settings, num_tokens):
    """Peak growth of resident memory and size of the plan in MiB, in a process of its own."""
    call = json.dumps([method, settings, num_tokens])
    # Freed memory goes back to the system at once, so that it is not counted twice.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.methods.test_memory", call]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def measure_here(method, settings, num_tokens):
    torch.set_num_threads(1)
    built = build_method(method, **settings)
    built.plan(*inputs(2048), layer_idx=0)  # loads code
    q, k = inputs(num_tokens)
    with torch.inference_mode():
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        plan = built.plan(q, k, layer_idx=0)
        peak = status("VmHWM") - before
    tensors = (getattr(plan, entry.name) for entry in fields(plan))
    storages = {t.data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
    return peak / MIB, sum(one.nbytes() for one in storages.values()) / MIB


def inputs(num_tokens):
    """A few keys stand out, as in models: with noise alone every selection would be dense."""
    generator = torch.Generator().manual_seed(0)
    q = torch.empty(1, NUM_HEADS, num_tokens, HEAD_DIM).normal_(generator=generator)
    k = torch.empty(1, NUM_KV_HEADS, num_tokens, HEAD_DIM).normal_(generator=generator)
    q += 1.0
    k[:, :, ::97] += 1.0
    return q, k


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings", "bound"), BOUNDS, ids=LABELS)
def test_selection_at_32k_tokens_stays_below_its_bound(method, settings, bound):
    peak, plan = measure(method, settings, NUM_TOKENS)
    assert 0 <= plan <= peak + 1
    assert peak <= bound


def test_every_method_has_a_bound():
    assert {name for name, _, _ in BOUNDS} == {*METHODS}


def test_a_measurement_sees_what_the_plan_keeps_and_little_more():
    peak, plan = measure("pbs", {"order": "avg_query"}, 8192)
    assert 16 <= plan <= 18  # the keys in plan order
    assert plan <= peak + 1 <= 64


if __name__ == "__main__":
    print(json.dumps(measure_here(*json.loads(sys.argv[1]))))
