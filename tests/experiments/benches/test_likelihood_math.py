"""Kept dense log-probabilities: what they cost, and how near the KL from them is to the direct."""

from dataclasses import replace

import pytest
import torch

from experiments.benches.likelihood_math import (
    NUM_KEPT,
    compare_to_dense,
    keep_dense,
    load_dense,
    save_dense,
)

VOCABULARY = 1000
POSITIONS = 70


def same(logits):
    return logits


def draw(seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    dense = scale * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    sparse = dense + 0.5 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    return dense, sparse, targets


def direct_kl(dense, sparse):
    log_p, log_q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), (log_p - log_q).abs().amax(-1)


@pytest.mark.parametrize("chunk", [1, 32, 512])
@pytest.mark.parametrize("num_kept", [NUM_KEPT, VOCABULARY, 4 * VOCABULARY])
def test_kl_is_within_the_bound_of_the_direct_one(num_kept, chunk):
    dense, sparse, targets = draw()
    kept = keep_dense(dense, targets, same, num_kept=num_kept, chunk=chunk)
    found = compare_to_dense(kept, sparse, targets, same, chunk=chunk)
    truth, largest = direct_kl(dense, sparse)
    bound = kept.log_rest.exp() * largest + 2**-7 * (1 + largest)
    assert torch.all((found.kl - truth).abs() <= bound)
    nll = torch.nn.functional.cross_entropy(sparse, targets, reduction="none")
    torch.testing.assert_close(found.nll, nll)
    dense_nll = torch.nn.functional.cross_entropy(dense, targets, reduction="none")
    torch.testing.assert_close(found.nll_difference, nll - dense_nll, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.is_same_choice, dense.argmax(-1) == sparse.argmax(-1))


def test_the_same_logits_differ_by_rounding_only():
    dense, _, targets = draw()
    found = compare_to_dense(keep_dense(dense, targets, same), dense, targets, same)
    assert found.kl.max() < 1e-5
    assert torch.all(found.nll_difference == 0)
    assert found.is_same_choice.all()


def test_what_is_read_back_gives_the_same_numbers(tmp_path):
    dense, sparse, targets = draw()
    kept = keep_dense(dense, targets, same)
    path = tmp_path / "cache" / "window.safetensors"
    save_dense(kept, path)
    assert [file.name for file in path.parent.iterdir()] == ["window.safetensors"]
    assert path.stat().st_size < POSITIONS * (6 * NUM_KEPT + 8) + 1000
    first = compare_to_dense(kept, sparse, targets, same)
    again = compare_to_dense(load_dense(path), sparse, targets, same)
    assert torch.equal(first.kl, again.kl)
    assert torch.equal(first.nll_difference, again.nll_difference)


def test_logits_are_made_a_chunk_at_a_time():
    dense, _, targets = draw()
    sizes = []
    keep_dense(dense, targets, lambda rows: (sizes.append(len(rows)), rows)[1], chunk=32)
    assert sizes == [32, 32, 6]


def test_what_does_not_fit_is_an_error(tmp_path):
    dense, sparse, targets = draw()
    kept = keep_dense(dense, targets, same)
    with pytest.raises(ValueError, match="vocabulary of 1000, the logits have 999"):
        compare_to_dense(kept, sparse[:, :-1], targets.clamp_max(998), same)
    with pytest.raises(ValueError, match="70 positions, got 69"):
        compare_to_dense(kept, sparse[1:], targets[1:], same)
    with pytest.raises(ValueError, match="at least one position"):
        keep_dense(dense[:0], targets[:0], same)
    with pytest.raises(ValueError, match="one token per position"):
        keep_dense(dense, targets[1:], same)
    with pytest.raises(ValueError, match="another tokenizer's"):
        keep_dense(dense, targets + VOCABULARY, same)
    with pytest.raises(ValueError, match="not all finite"):
        compare_to_dense(kept, sparse.index_fill(0, torch.tensor([40]), torch.nan), targets, same)
    for setting in ({"num_kept": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            keep_dense(dense, targets, same, **setting)
    broken = tmp_path / "broken"
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="remove it, it is computed again"):
        load_dense(broken)


def test_kl_is_not_negative_where_one_token_has_all():
    _, _, targets = draw()
    dense = torch.zeros(POSITIONS, VOCABULARY)
    dense[:, 3] = 200.0
    kept = keep_dense(dense, targets, same)
    found = compare_to_dense(replace(kept), dense + 1.0, targets, same)
    assert torch.all(found.kl >= 0)
    assert found.kl.max() < 1e-5
