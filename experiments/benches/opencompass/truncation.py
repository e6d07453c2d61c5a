"""LongBench's rule for prompts that are too long: keep both ends, cut the middle."""

from __future__ import annotations


def cut_middle(ids: list[int], limit: int) -> list[int]:
    """Shorten token ids to ``limit`` by removing the middle; shorter ones stay as they are.

    Instructions stand at the start of a prompt and the question at its end, with the document in
    between; of an odd ``limit`` the end gets the larger half.

    Args:
        ids: the whole prompt, chat template included, so that its ends survive too.
        limit: tokens to keep, at least 2.

    Raises:
        ValueError: a limit below 2.

    Source: LongBench's pred.py cuts the text before the chat template, in decoded text; cutting
    the final ids keeps the limit exact.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2, to keep both ends, got {limit}")
    if len(ids) <= limit:
        return ids
    num_head = limit // 2
    return ids[:num_head] + ids[len(ids) - (limit - num_head) :]


def prompt_limit(*, max_seq_len: int | None, model_length: int, max_out_len: int) -> int:
    """Tokens a prompt may have so that the answer still fits.

    Args:
        max_seq_len: prompt plus answer as the bench allows; None for what the model takes.
        model_length: prompt plus answer as the model takes.
        max_out_len: room for the answer.

    Raises:
        ValueError: no room for a prompt is left.
    """
    total = model_length if max_seq_len is None else min(max_seq_len, model_length)
    if total - max_out_len < 2:
        raise ValueError(
            f"no room for a prompt: bench.max_seq_len={max_seq_len} and model.max_length="
            f"{model_length} allow {total} tokens, of which the answer takes {max_out_len}; raise "
            "bench.max_seq_len or lower bench.max_out_len"
        )
    return total - max_out_len
