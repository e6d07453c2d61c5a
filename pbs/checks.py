"""Checks of parameters that several methods, orders and selectors share."""

from __future__ import annotations

from collections.abc import Iterable

from pbs.registry import unknown

LARGEST = 2**63 - 1


def check_block_size(value: int, *, name: str = "block_size") -> None:
    """A power of two of at least 16 (the smallest tile of the matrix units)."""
    _check_int(value, name)
    if value < 16 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two of at least 16, got {value}; try 128")


def check_segment_size(value: int, block_size: int) -> None:
    """A positive multiple of the block size."""
    _check_int(value, "segment_size")
    if value < block_size or value % block_size:
        near = max(1, value // block_size) * block_size
        raise ValueError(
            f"segment_size must be a multiple of block_size, got {value} and {block_size}; try "
            f"{near} or {near + block_size}"
        )


def check_threshold(value: float, *, name: str = "threshold") -> None:
    """A number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:  # also false for NaN
        raise ValueError(f"{name} must lie in (0, 1], got {value}; 1 keeps every block")


def check_choice(value: str, valid: Iterable[str], *, name: str) -> None:
    """One of the valid names."""
    valid = list(valid)
    if value not in valid:
        raise ValueError(unknown(name, value, valid))


def check_positive_int(value: int, *, name: str) -> None:
    """An integer of at least 1."""
    check_integer(value, name=name, smallest=1)


def check_integer(value: int, *, name: str, smallest: int) -> None:
    """An integer of at least ``smallest`` that fits into a tensor."""
    _check_int(value, name)
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}")


def check_table(
    name: str, sizes: tuple[int, ...], *, num_layers: int, num_heads: int | None
) -> None:
    """Settings per layer and head, or per head, are as many as a model has of them.

    Args:
        name: where the settings come from, for the message.
        sizes: (layers, heads) or (heads,) of the settings; () for one setting that fits all.
        num_layers: of the model.
        num_heads: query heads of the model's layers; None: not compared.
    """
    if not sizes:
        return
    model = (num_layers, sizes[-1] if num_heads is None else num_heads)[-len(sizes) :]
    if sizes != model:
        raise ValueError(
            f"{name} is for {_as_words(sizes)}, the model has {_as_words(model)}; use the one made "
            "for this model"
        )


def _as_words(sizes: tuple[int, ...]) -> str:
    """(64, 32) as "64 layers of 32 heads", (32,) as "32 heads"."""
    units = ("layer", "head")[-len(sizes) :]
    return " of ".join(
        f"{size} {unit}{'' if size == 1 else 's'}" for size, unit in zip(sizes, units, strict=True)
    )


def _check_int(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if abs(value) > LARGEST:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
