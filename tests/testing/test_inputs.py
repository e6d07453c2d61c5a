"""The generated heads have the structure they are named after."""

import pytest
import torch

from pbs import build_method
from pbs.testing import make_qkv


def attention(q, k):
    """Probabilities [Z, Hq, Nq, Nk]."""
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[3] ** -0.5
    num_queries, num_keys = logits.shape[2:]
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    return logits.masked_fill(torch.arange(num_keys) > positions, float("-inf")).softmax(-1)


def heavy_share(weights):
    """Share of the attention of the later half of queries on the 2 % best keys, [Z, Hq]."""
    half = weights[:, :, weights.shape[2] // 2 :].mean(2)
    return half.topk(weights.shape[3] // 50, dim=-1).values.sum(-1)


def best_diagonal(weights):
    """Largest mean probability at one distance of at least 1, [Z, Hq]."""
    distances = range(1, weights.shape[2] // 2 + 1)
    means = [weights.diagonal(-distance, 2, 3).mean(-1) for distance in distances]
    return torch.stack(means).amax(0)


@pytest.mark.parametrize("structure", ["random", "vertical", "slash", "mixed"])
def test_inputs_have_the_asked_shapes_and_are_reproducible(structure):
    arguments = {"num_queries": 100, "dtype": torch.bfloat16, "structure": structure, "seed": 5}
    state = torch.get_rng_state()
    q, k, v = make_qkv(2, 6, 3, 130, 16, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 100, 16), (2, 3, 130, 16), (2, 3, 130, 16))
    assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
    again = make_qkv(2, 6, 3, 130, 16, **arguments)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    other = make_qkv(2, 6, 3, 130, 16, **(arguments | {"seed": 6}))
    assert not torch.equal(k, other.k)
    whole = make_qkv(2, 6, 3, 130, 16, **(arguments | {"num_queries": None}))
    assert torch.equal(whole.q[:, :, 30:], q)


def test_vertical_heads_look_at_few_keys():
    q, k, _ = make_qkv(2, 4, 2, 1024, 64, structure="vertical")
    assert heavy_share(attention(q, k)).min() > 0.4
    q, k, _ = make_qkv(2, 4, 2, 1024, 64, structure="random")
    assert heavy_share(attention(q, k)).max() < 0.1


def test_slash_heads_look_at_fixed_distances():
    q, k, _ = make_qkv(2, 4, 2, 1500, 64, structure="slash")
    weights = attention(q, k)
    assert best_diagonal(weights).min() > 0.1
    assert heavy_share(weights).max() < 0.4
    q, k, _ = make_qkv(2, 4, 2, 1500, 64, structure="random")
    assert best_diagonal(attention(q, k)).max() < 0.02


def test_mixed_heads_take_turns():
    q, k, _ = make_qkv(1, 3, 1, 1500, 64, structure="mixed")
    weights = attention(q, k)
    lines, slashes = heavy_share(weights)[0], best_diagonal(weights)[0]
    assert lines[0] > 0.4
    assert slashes[1] > 0.1
    assert lines[2] > 0.2
    assert slashes[2] > 0.05
    assert slashes[0] < 0.02


def test_permutation_pays_on_vertical_heads():
    q, k, _ = make_qkv(1, 4, 2, 2048, 64, structure="vertical")
    arguments = {"block_size": 64, "segment_size": 256}
    ordered = build_method("pbs", **arguments).plan(q, k).density().mean()
    natural = build_method("pbs", order="none", **arguments).plan(q, k).density().mean()
    assert ordered < natural - 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "verticle"}, "Did you mean 'vertical'"),
        ({"kv_heads": 3}, "q_heads a multiple of kv_heads"),
        ({"batch": 0}, "expected positive sizes"),
        ({"num_queries": 65}, "num_queries <= num_keys, got 65 and 64"),
        ({"num_queries": 0}, "0 < num_queries"),
        ({"structure": "slash", "head_dim": 15}, "needs an even head_dim"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"batch": 1, "q_heads": 4, "kv_heads": 2, "num_keys": 64, "head_dim": 16} | changes
    with pytest.raises(ValueError, match=message):
        make_qkv(**arguments)
