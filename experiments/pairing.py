"""Which samples of two runs may be compared: equal names and equal inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.store import Record

# What must be equal where both records say it: what the model saw, and what counts as right.
# "prompt" is the digest of the prompt's text in runs of OpenCompass's benches.
INPUTS = ("input_digest", "prompt", "reference", "answers")


@dataclass(frozen=True)
class Pairs:
    """Samples of a run beside those of another, in the order of the first.

    Attributes:
        ours: records of the run that have a partner.
        theirs: their partners.
        differing: ids of samples that both have and that were asked something else.
        num_alone: samples of the run that the other does not have.
    """

    ours: tuple[Record, ...]
    theirs: tuple[Record, ...]
    differing: tuple[str, ...]
    num_alone: int


def pair_records(ours: Sequence[Record], theirs: Sequence[Record]) -> Pairs:
    """Pair samples by ``sample_id``; pairs with other inputs are named and left out.

    Records from before there were digests (``input_digest``) pair by their id and by what they say
    about their inputs: the prompt's digest and the right answers.
    """
    by_id = {record["sample_id"]: record for record in theirs}
    pairs, differing, num_alone = [], [], 0
    for record in ours:
        partner = by_id.get(record["sample_id"])
        if partner is None:
            num_alone += 1
        elif _are_equal(record, partner):
            pairs.append((record, partner))
        else:
            differing.append(record["sample_id"])
    return Pairs(
        tuple(record for record, _ in pairs),
        tuple(partner for _, partner in pairs),
        tuple(differing),
        num_alone,
    )


def _are_equal(record: Record, partner: Record) -> bool:
    known = [key for key in INPUTS if key in record and key in partner]
    return all(record[key] == partner[key] for key in known)
