"""The computed part of docs/scaling.md."""

import pytest

from experiments.tools.scaling import (
    MILLION,
    PAGE,
    Cluster,
    exchange,
    first_token,
    llama,
    rewrite,
)


def test_the_tables_are_what_the_model_says():
    text = PAGE.read_text()
    assert rewrite(text) == text
    assert "Nothing in this section was run on more than one GPU" in text


def test_one_host_exchanges_nothing_and_more_hosts_share_the_work():
    model = llama()
    assert set(exchange(model, MILLION, Cluster(8), shared_order=True).values()) == {0.0}
    one, two = (first_token(model, MILLION, Cluster(n)) for n in (8, 16))
    assert two["work"] == pytest.approx(one["work"] / 2)
    assert two["sums"] == pytest.approx(one["sums"] / 2)
    assert one["exchange"] == 0 < two["exchange"]
    alone = first_token(model, MILLION, Cluster(1, per_host=1))
    assert alone["sums"] == 0
    assert alone["work"] == pytest.approx(8 * one["work"], rel=0.01)  # logits are not shared


def test_what_is_exchanged_by_hand():
    found = exchange(llama(), MILLION, Cluster(16), shared_order=False)
    # One key/value head of 128 in bf16, keys and values, half of them elsewhere; four orders.
    assert found["gather"] == 0.5 * (2 * MILLION * 128 * 2 + 4 * MILLION * 4)
    assert found["selection"] == 0.5 * MILLION / 128 * 4 * 128 * 4
    shared = exchange(llama(), MILLION, Cluster(16), shared_order=True)
    assert shared["selection"] == found["selection"] / 4
