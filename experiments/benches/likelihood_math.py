"""What a likelihood run computes: losses, KL(dense || sparse) and equal first choices, in chunks.

Dense log-probabilities are kept compactly: per position the ``num_kept`` largest, fp16, with their
token ids, and the probability of all other tokens together. 10 windows of 8192 positions at a
vocabulary of 49152 would be 7.5 GiB whole in fp16; the 256 largest, 6 bytes each, are 120 MiB.

The KL kept is that of the distributions with the other tokens joined into one. Joining never adds
to a KL (log-sum inequality), so it is a lower bound of the whole one. What it misses is at most
``rest * max |log p - log q|`` over the joined tokens, ``rest`` being their dense probability; the
fp16 of the log-probabilities p above e-16 adds less than 2 ** -7 * |1 + log p - log q| on average.

Shapes: N positions, V vocabulary, K kept tokens. Importable without hydra and wandb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NUM_KEPT = 256
CHUNK = 256
_FIELDS = ("token_ids", "log_probs", "log_rest", "nll")


@dataclass(frozen=True)
class DenseLikelihood:
    """What is kept of a dense run of one window.

    Attributes:
        token_ids: int32 ``[N, K]``, likeliest first.
        log_probs: fp32 ``[N, K]``, nats, of these tokens.
        log_rest: fp32 ``[N]``, nats: of all other tokens together; -inf if there are none.
        nll: fp32 ``[N]``, nats, of the tokens that follow.
        vocab_size: V.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    nll: Tensor
    vocab_size: int


@dataclass(frozen=True)
class Comparison:
    """One window, sparse against dense, per position.

    Attributes:
        nll: fp32 ``[N]``, nats, of the sparse run.
        nll_difference: fp32 ``[N]``, nats, sparse less dense.
        kl: fp32 ``[N]``, nats, KL(dense || sparse), not below 0.
        is_same_choice: bool ``[N]``: both find the same token likeliest.
    """

    nll: Tensor
    nll_difference: Tensor
    kl: Tensor
    is_same_choice: Tensor


def keep_dense(
    hidden: Tensor,
    targets: Tensor,
    to_logits: Callable[[Tensor], Tensor],
    *,
    num_kept: int = NUM_KEPT,
    chunk: int = CHUNK,
) -> DenseLikelihood:
    """Reduce a dense run to what comparisons need.

    Args:
        hidden: ``[N, ...]``, what ``to_logits`` makes logits of.
        targets: ``[N]``, the token that follows each position.
        to_logits: from a chunk of ``hidden`` to ``[n, V]``, such as the model's head.
        num_kept: tokens kept per position, at least 1; V at most are.
        chunk: positions at once: memory is a few times ``chunk * V`` fp32.

    Raises:
        ValueError: no position, shapes that do not fit, a target outside the vocabulary, or logits
            that are not finite.
    """
    if num_kept < 1:
        raise ValueError(f"num_kept must be at least 1, got {num_kept}")
    parts: list[tuple[Tensor, ...]] = []
    vocab_size = 0
    for _, log_probs, target in _chunks(hidden, targets, to_logits, chunk):
        vocab_size = log_probs.shape[-1]
        top, ids = log_probs.topk(min(num_kept, vocab_size), dim=-1)
        # Rounded here, as on disk, so that a first run and a resumed one give the same numbers.
        top = top.half().float()
        rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        nll = -log_probs.gather(-1, target[:, None])[:, 0]
        parts.append((ids.int().cpu(), top.cpu(), rest.cpu(), nll.cpu()))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return DenseLikelihood(*columns, vocab_size=vocab_size)


def compare_to_dense(
    dense: DenseLikelihood,
    hidden: Tensor,
    targets: Tensor,
    to_logits: Callable[[Tensor], Tensor],
    *,
    chunk: int = CHUNK,
) -> Comparison:
    """Compare a run to the dense one of the same window; arguments as :func:`keep_dense`.

    Raises:
        ValueError: as there, or another number of positions or another vocabulary than dense has.
    """
    if len(hidden) != len(dense.nll):
        raise ValueError(
            f"dense was kept for {len(dense.nll)} positions, got {len(hidden)}: another window"
        )
    parts: list[tuple[Tensor, ...]] = []
    for rows, log_probs, target in _chunks(hidden, targets, to_logits, chunk):
        if log_probs.shape[-1] != dense.vocab_size:
            raise ValueError(
                f"dense was kept for a vocabulary of {dense.vocab_size}, the logits have "
                f"{log_probs.shape[-1]}: another model; remove what was kept and run again"
            )
        device = log_probs.device
        ids = dense.token_ids[rows].to(device).long()
        nll = -log_probs.gather(-1, target[:, None])[:, 0]
        kept = log_probs.gather(-1, ids)
        rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
        log_p = dense.log_probs[rows].to(device)
        kl = _kl(log_p, dense.log_rest[rows].to(device), kept, rest)
        is_same = log_probs.argmax(-1) == ids[:, 0]
        parts.append((nll.cpu(), kl.cpu(), is_same.cpu()))
    nll, kl, is_same = (torch.cat(column) for column in zip(*parts, strict=True))
    return Comparison(nll, nll - dense.nll, kl, is_same)


def save_dense(dense: DenseLikelihood, path: Path) -> None:
    """Write what is kept; the file appears whole or not at all."""
    tensors = {name: getattr(dense, name).contiguous() for name in _FIELDS}
    tensors["log_probs"] = tensors["log_probs"].half()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, metadata={"vocab_size": str(dense.vocab_size)})
    part.replace(path)


def load_dense(path: Path) -> DenseLikelihood:
    """Read what :func:`save_dense` wrote.

    Raises:
        ValueError: the file is broken or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in _FIELDS}
            vocab_size = int(file.metadata()["vocab_size"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no dense log-probabilities ({error}); remove it, it is computed again"
        ) from error
    tensors["log_probs"] = tensors["log_probs"].float()
    return DenseLikelihood(**tensors, vocab_size=vocab_size)


def _kl(log_p: Tensor, log_p_rest: Tensor, log_q: Tensor, log_q_rest: Tensor) -> Tensor:
    """KL ``[n]`` over kept tokens and the joined rest.

    Each term is ``p log(p / q) - p + q``, which is not negative: both distributions sum to 1, so
    nothing is added but the rounding of p, whose first order it cancels.
    """
    log_p = torch.cat([log_p, log_p_rest[:, None]], dim=-1)
    log_q = torch.cat([log_q, log_q_rest[:, None]], dim=-1)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(p > 0, log_p - log_q, 0.0)
    return (p * ratio - p + q).sum(-1).clamp_min(0)


def _chunks(
    hidden: Tensor, targets: Tensor, to_logits: Callable[[Tensor], Tensor], chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their log-probabilities fp32 ``[n, V]``, and their targets on the same device."""
    if not len(hidden):
        raise ValueError("a window needs at least one position with a token after it, got none")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be one token per position, [{len(hidden)}], got {list(targets.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}")
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        logits = to_logits(hidden[rows]).float()
        target = targets[rows].to(logits.device).long()
        if target.min() < 0 or target.max() >= logits.shape[-1]:
            raise ValueError(
                f"targets must be tokens of the vocabulary of {logits.shape[-1]}, got "
                f"{int(target.min())} to {int(target.max())}: another tokenizer's"
            )
        if not torch.isfinite(logits).all():
            raise ValueError(f"logits of positions {start} to {rows.stop - 1} are not all finite")
        yield rows, logits.log_softmax(-1), target
