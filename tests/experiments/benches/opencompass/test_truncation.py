"""LongBench's rule: both ends stay, the middle goes."""

import pytest

from experiments.benches.opencompass.truncation import cut_middle, prompt_limit


@pytest.mark.parametrize("length", [3, 4, 99, 100, 101, 1000])
@pytest.mark.parametrize("limit", [2, 3, 99, 100])
def test_both_ends_stay_and_the_limit_holds(length, limit):
    ids = list(range(length))
    kept = cut_middle(ids, limit)
    assert len(kept) == min(length, limit)
    num_head = limit // 2
    assert kept[:num_head] == ids[: min(num_head, length)]
    assert kept[-1] == ids[-1]
    assert kept == sorted(set(kept))


def test_what_fits_is_not_touched():
    ids = [5, 3, 9]
    assert cut_middle(ids, 3) is ids


def test_a_limit_without_two_ends_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        cut_middle([1, 2, 3], 1)


@pytest.mark.parametrize(
    ("max_seq_len", "model_length", "limit"),
    [(1000, 500, 400), (500, 1000, 400), (None, 500, 400)],
)
def test_the_answer_has_room(max_seq_len, model_length, limit):
    assert limit == prompt_limit(
        max_seq_len=max_seq_len, model_length=model_length, max_out_len=100
    )


def test_no_room_for_a_prompt_is_an_error():
    with pytest.raises(ValueError, match=r"allow 100 tokens.*answer takes 99"):
        prompt_limit(max_seq_len=100, model_length=500, max_out_len=99)
