"""PBS-Attn+: antidiagonal scores on permuted keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pbs.methods.facts import Facts, at
from pbs.methods.pbs import PBS


@dataclass(kw_only=True)
class PBSPlus(PBS):
    """PBS with XAttention's scores instead of mean pooling.

    Args:
        selector: as in :class:`PBS`.
        stride: s, divides the block size; larger is cheaper and coarser.
        normaliser: softmax over the "candidates" only, or over all "causal" groups, so that what
            the own segment and the forced block hold counts as covered and fewer blocks reach the
            threshold, which is then an estimated coverage. The paper does not say which.

    Source: arXiv 2510.21270 (v2), PBS-Attn+; the authors released no code for it.
    """

    facts = Facts(
        "PBS+",
        "#882255",
        "D",
        selection="antidiagonal",
        moves_keys=True,
        curve=at("threshold", 0.5, 0.7, 0.9),
    )

    selector: str = "antidiagonal"
    stride: int = 8
    normaliser: str = "candidates"

    def __post_init__(self) -> None:
        if self.selector != "antidiagonal":
            raise ValueError(
                f"pbs_plus is PBS with selector 'antidiagonal', got {self.selector!r}; use "
                "method=pbs to choose another selector"
            )
        if self.selector_params:
            raise ValueError(
                "pbs_plus has its selector's parameters as its own, got selector_params="
                f"{self.selector_params}; set stride and normaliser instead"
            )
        super().__post_init__()
        if self.block_size % self.stride:
            raise ValueError(
                f"stride must divide block_size, got {self.stride} and {self.block_size}; try 8"
            )

    def _selector_settings(self) -> dict[str, Any]:
        """See the base class."""
        return {"stride": self.stride, "normaliser": self.normaliser}
