"""The grid of tiles over a causal attention map, and where sequences lie in a padded batch.

Legend (used in all of ``pbs``): Z batch, Hq query heads, Hkv key/value heads, Ho heads that have an
order of their own (Hq or Hkv), D head dim, N tokens (Nq queries and Nk keys where they differ),
T tiles (Tq, Tk), B block size, S segment size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """Tiles of ``query_tile`` x ``key_tile`` over Nq queries and Nk keys, aligned bottom-right.

    Query row n sits at position ``n + num_keys - num_queries`` and sees the keys up to it.
    """

    num_queries: int
    num_keys: int
    query_tile: int
    key_tile: int

    def __post_init__(self) -> None:
        if not 0 < self.num_queries <= self.num_keys:
            raise ValueError(
                "expected 0 < num_queries <= num_keys (keys include the cache and the queries' own "
                f"tokens), got {self.num_queries} queries and {self.num_keys} keys"
            )

    @property
    def offset(self) -> int:
        """Position of the first query: how many keys precede it."""
        return self.num_keys - self.num_queries

    @property
    def num_query_tiles(self) -> int:
        """Tq."""
        return -(-self.num_queries // self.query_tile)

    @property
    def num_key_tiles(self) -> int:
        """Tk."""
        return -(-self.num_keys // self.key_tile)

    def first_positions(
        self, device: torch.device | str = "cpu", *, query_segment: int = 0
    ) -> Tensor:
        """Position of each query tile's earliest row, int64 ``[Tq]``.

        With ``query_segment`` (a multiple of the query tile): rows may be reordered inside chunks
        of that many, so that the chunk's first row may be in any of its tiles.
        """
        unit = query_segment or self.query_tile
        rows = torch.arange(self.num_query_tiles, device=device) * self.query_tile
        return rows // unit * unit + self.offset

    def last_positions(
        self, device: torch.device | str = "cpu", *, query_segment: int = 0
    ) -> Tensor:
        """Position of each query tile's latest real row, int64 ``[Tq]``."""
        last = self.first_positions(device, query_segment=query_segment)
        return (last + (query_segment or self.query_tile) - 1).clamp(max=self.num_keys - 1)

    def past_tiles(
        self,
        device: torch.device | str = "cpu",
        *,
        segment_size: int = 0,
        query_segment: int = 0,
    ) -> Tensor:
        """Key tiles that every row of a query tile sees whole, bool ``[Tq, Tk]``.

        With ``segment_size`` (a multiple of the key tile): only tiles in segments that end before
        the segment of the query tile's first row, the ones whose keys may have been reordered.
        """
        first = self.first_positions(device, query_segment=query_segment)
        if segment_size:
            first = first // segment_size * segment_size
        key_ends = (torch.arange(self.num_key_tiles, device=device) + 1) * self.key_tile
        return key_ends[None, :] <= first[:, None]

    def num_causal_key_tiles(self, num_query_tiles: int) -> int:
        """Leading key tiles that the first so many query tiles see, in whole or in part."""
        last = min(num_query_tiles * self.query_tile, self.num_queries) - 1 + self.offset
        return last // self.key_tile + 1

    @cached_property
    def num_causal_tiles(self) -> int:
        """Tiles that dense causal attention computes; T (T + 1) / 2 for Nq = Nk."""
        return int((self.last_positions() // self.key_tile + 1).sum())


@lru_cache(maxsize=16)
def candidate_tiles(
    grid: BlockGrid,
    device: torch.device,
    *,
    segment_size: int = 0,
    query_segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """:meth:`BlockGrid.past_tiles` and how many there are in each row, int32 ``[Tq]``.

    Kept, since every layer of a model asks for the same ones. Do not write into them.
    """
    tiles = grid.past_tiles(segment_size=segment_size, query_segment=query_segment)
    return tiles.to(device), tiles.sum(dim=-1, dtype=torch.int32).to(device)


@dataclass(frozen=True)
class Geometry:
    """Which key slots hold which sequence's real tokens, and which slot the first query has.

    Attributes:
        num_queries: Nq, rows of q.
        num_keys: Nk, slots of k and v.
        query_offset: slot of query row 0; ``num_keys - num_queries`` unless a cache is longer than
            what has been written to it.
        starts: per sequence, the slot of its first real token (> 0 when padded on the left).
        ends: per sequence, one past the slot of its last real token.
    """

    num_queries: int
    num_keys: int
    query_offset: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_queries < 1 or not 0 <= self.query_offset <= self.num_keys - self.num_queries:
            raise ValueError(
                "the queries must lie in the key slots: expected 0 <= query_offset and "
                f"query_offset + num_queries <= num_keys, got query_offset={self.query_offset}, "
                f"num_queries={self.num_queries}, num_keys={self.num_keys}"
            )
        if len(self.starts) != len(self.ends) or not self.starts:
            raise ValueError(
                f"expected one start and one end per sequence, got {len(self.starts)} starts and "
                f"{len(self.ends)} ends"
            )
        for start, end in zip(self.starts, self.ends, strict=True):
            if not 0 <= start <= end <= self.num_keys:
                raise ValueError(
                    f"expected 0 <= start <= end <= {self.num_keys} for every sequence, got "
                    f"[{start}, {end})"
                )

    @classmethod
    def unpadded(cls, batch_size: int, num_queries: int, num_keys: int) -> Geometry:
        """Every slot real, queries last (bottom-right aligned)."""
        offset = num_keys - num_queries
        return cls(num_queries, num_keys, offset, (0,) * batch_size, (num_keys,) * batch_size)

    @classmethod
    def from_padding_mask(
        cls, mask: Tensor, *, num_queries: int, query_offset: int | None = None
    ) -> Geometry:
        """Read starts and ends off a padding mask (one synchronisation with the device).

        Args:
            mask: bool or int ``[Z, Nk]``, non-zero for real tokens.
            num_queries: Nq.
            query_offset: slot of the first query; default: the queries are the last slots.

        Raises:
            ValueError: mask not two-dimensional.
            NotImplementedError: a row has padding between real tokens (packed sequences, or virtual
                tokens in front of left padding).
        """
        if mask.ndim != 2:
            raise ValueError(f"expected a padding mask [Z, Nk], got shape {tuple(mask.shape)}")
        real = mask != 0
        num_keys = mask.shape[1]
        counts = real.sum(dim=1)
        starts = real.int().argmax(dim=1) * (counts > 0)
        spans = torch.stack([starts, counts]).tolist()
        ends = tuple(start + count for start, count in zip(*spans, strict=True))
        slots = torch.arange(num_keys, device=mask.device)
        inside = (slots >= starts[:, None]) & (slots < (starts + counts)[:, None])
        if not torch.equal(inside, real):
            raise NotImplementedError(
                "the padding mask has padding between real tokens; expected padding only before "
                "or after each sequence. Virtual tokens (prompt tuning) in front of left padding "
                "look like this: pad on the right, or run the prompts one by one. Packed sequences "
                "do, too: run them one by one, or as a padded batch"
            )
        offset = num_keys - num_queries if query_offset is None else query_offset
        return cls(num_queries, num_keys, offset, tuple(spans[0]), ends)

    @property
    def is_unpadded(self) -> bool:
        """True when every slot is real and the queries are the last slots."""
        return (
            self.query_offset + self.num_queries == self.num_keys
            and all(start == 0 for start in self.starts)
            and all(end == self.num_keys for end in self.ends)
        )

    def spans(self) -> Iterator[tuple[list[int], slice, slice]]:
        """Groups of sequences that occupy the same slots.

        Yields:
            (indices of the sequences, rows of q with real tokens, slots of k they may see). Both
            slices end at the same token, so that inside them queries are bottom-right aligned.
            Sequences without a real query are left out.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, span in enumerate(zip(self.starts, self.ends, strict=True)):
            groups.setdefault(span, []).append(index)
        for (start, end), members in groups.items():
            first = max(start - self.query_offset, 0)
            last = min(end - self.query_offset, self.num_queries)
            if first < last:
                yield members, slice(first, last), slice(start, last + self.query_offset)
