"""PBS whose order and selector protect keys that few queries want, and whose threshold covers."""

from __future__ import annotations

from dataclasses import dataclass

from pbs.methods.facts import Facts, at
from pbs.methods.pbs import PBS
from pbs.orders.spread import SpreadOrder


@dataclass(kw_only=True)
class PBSCalibrated(PBS):
    """PBS with sampled exact scores, an order by spread queries, and a chosen own segment.

    The published selector pools queries and keys, which loses the one key of a block that matters,
    and its order asks the last queries alone. Here exact scores of every 16th query rank the
    blocks, joined by a power mean so that a block which few queries need is kept; the order is the
    power mean of the attention of queries all over the prompt; and of a query's own segment only
    what scores is computed, so that segments can be long. docs/findings.md: what each is worth.

    Args:
        segment_size: as in :class:`PBS`.
        threshold: coverage to reach (τ), in (0, 1]: the share of a query block's attention that
            the computed keys hold, own and forced ones included, as the sampled queries estimate
            it; 1 equals dense attention.
        order: as in :class:`PBS`.
        selector: as in :class:`PBS`; one that does not credit own keys makes τ relative again.
        local_blocks: as in :class:`PBS`.
    """

    facts = Facts(
        "PBS calibrated",
        "#994F00",
        ">",
        selection="sampled",
        moves_keys=True,
        order_rows=SpreadOrder().num_asked,
        is_row_local=False,  # queries all over the prompt say where keys go
        curve=at("threshold", 0.7, 0.9, 0.97),
    )

    segment_size: int = 1024
    threshold: float = 0.9
    order: str = "spread"
    selector: str = "sampled"
    local_blocks: int | None = 1
