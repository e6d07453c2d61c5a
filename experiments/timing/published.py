"""Published numbers that ours are set beside. They are quoted, never measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One length of the paper's Table 7, milliseconds on an H100 80GB; total is their sum."""

    length: int
    dense_ms: float
    permute_ms: float
    select_ms: float
    attention_ms: float
    total_ms: float

    @property
    def speed_up(self) -> float:
        """Over FlashAttention-2."""
        return self.dense_ms / self.total_ms


# arXiv 2510.21270 (v2), Table 7: key permutation, Llama-3.1-8B, FlashAttention-2 as dense.
TABLE7 = tuple(
    PublishedRow(*row)
    for row in (
        (8192, 1.78, 0.82, 0.86, 1.31, 2.99),
        (16384, 6.67, 1.02, 0.62, 4.08, 5.71),
        (32768, 26.10, 1.68, 0.60, 13.83, 16.11),
        (65536, 106.84, 3.24, 1.24, 42.44, 46.92),
        (131072, 443.29, 6.22, 3.21, 150.45, 159.87),
        (262144, 1837.32, 13.87, 11.81, 563.54, 589.22),
        (524288, 7496.67, 26.76, 41.99, 2128.16, 2196.91),
    )
)

# Table 5, tau = 0.9, with permutation: selected / causal blocks.
DENSITIES = {
    8192: 1205 / 2080,
    16384: 4005 / 8256,
    32768: 13337 / 32896,
    65536: 37632 / 131328,
    131072: 114996 / 524800,
}

# Table 5, tau = 0.9, without the permutation.
DENSITIES_UNPERMUTED = {
    8192: 1350 / 2080,
    16384: 4457 / 8256,
    32768: 15135 / 32896,
    65536: 43064 / 131328,
    131072: 134270 / 524800,
}

# Table 6, Llama-3.1-8B at 32K and 97.5 % coverage: shares of the heads.
HEADS_COVERAGE = 0.975
HEADS = {"helped": 0.708, "unchanged": 0.240, "harmed": 0.052}


def density_at(length: int) -> tuple[float, bool]:
    """The density to run a length at, and whether the paper states it.

    Beyond 128K nothing is published: the density of 128K is used, which the paper's own times at
    256K and 512K (attention 3.75 and 3.78 times that of half the length) do not contradict. Between
    two published lengths, that of the shorter one; below 8K that of 8K.
    """
    known = max((n for n in DENSITIES if n <= length), default=min(DENSITIES))
    return DENSITIES[known], length in DENSITIES
