"""What a method has to do: operations, bytes and launches, counted and not measured.

Plain Python. :func:`method_cost` gives the work of a method's stages, :func:`floor_ms` the time
below which no version gets on a chip of given rates, :func:`attention_memory` what has to fit.
Whole models: :mod:`experiments.timing.model_cost`. Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pbs.methods import METHODS
from pbs.methods.facts import Facts
from pbs.selectors.sampled import SampledSelector

FP32 = 4
INT16 = 2
INT64 = 8
# Pooled scores that the Triton selection holds at once (pbs.ops.block_selection.triton).
POOLED_SCORE_BYTES = float(FP32 << 23)


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer.

    Attributes:
        q_heads: Hq, a multiple of ``kv_heads``.
        kv_heads: Hkv.
        head_dim: D.
        element_size: bytes of one element of q, k, v.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    element_size: int = 2

    def __post_init__(self) -> None:
        sizes = (self.q_heads, self.kv_heads, self.head_dim)
        if min(sizes) < 1 or self.q_heads % self.kv_heads:
            raise ValueError(
                "expected positive sizes and q_heads a multiple of kv_heads, got "
                f"q_heads={self.q_heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
            )

    @classmethod
    def parse(cls, text: str, *, element_size: int = 2) -> Shape:
        """From ``"Hq/Hkv/D"``, such as "32/8/128".

        Raises:
            ValueError: not three positive numbers, or heads that do not divide.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise ValueError(f"expected a head shape as Hq/Hkv/D, such as 32/8/128, got {text!r}")
        q_heads, kv_heads, head_dim = map(int, parts)
        return cls(q_heads, kv_heads, head_dim, element_size)

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_dim}"

    def query_bytes(self, num_tokens: int) -> int:
        """Size of q, or of the output."""
        return self.q_heads * num_tokens * self.head_dim * self.element_size

    def key_bytes(self, num_tokens: int, *, heads: int | None = None) -> int:
        """Size of k, or of v, or of copies of them with another number of heads."""
        heads = self.kv_heads if heads is None else heads
        return heads * num_tokens * self.head_dim * self.element_size

    def input_bytes(self, num_tokens: int) -> int:
        """Size of q, k, v and the output together."""
        return 2 * self.query_bytes(num_tokens) + 2 * self.key_bytes(num_tokens)


@dataclass(frozen=True)
class Rates:
    """What a chip reaches.

    Attributes:
        name: the chip, and where the numbers come from.
        flops: matrix operations per second in the inputs' dtype.
        bandwidth: bytes per second of its memory, read plus written.
    """

    name: str
    flops: float
    bandwidth: float


# H100 SXM: what FlashAttention-3 and cuDNN reach in dense attention (600e12) and a large matrix
# product (798e12), and a device-to-device copy; H200: the same measurements.
DENSE_H100 = Rates("H100, the rate of the best dense attention kernels", 600e12, 3.0e12)
H100 = Rates("H100, measured matrix product and copy", 798e12, 3.0e12)
H200 = Rates("H200, measured matrix product and copy", 788e12, 4.3e12)


def known_rates(device_name: str) -> Rates | None:
    """Rates of a GPU by its name; None for one that has not been measured."""
    for key, rates in (("H100", H100), ("H200", H200)):
        if key in device_name:
            return rates
    return None


@dataclass(frozen=True)
class Work:
    """One stage of a method.

    Attributes:
        flops: floating-point operations.
        num_bytes: bytes through the chip's memory, each tensor once in and once out.
        num_launches: kernels of an implementation without fusion across stages.
    """

    flops: float = 0.0
    num_bytes: float = 0.0
    num_launches: int = 0

    def floor_ms(self, rates: Rates) -> float:
        """The larger of the two times; what cannot overlap is not counted."""
        return 1e3 * max(self.flops / rates.flops, self.num_bytes / rates.bandwidth)


def dense_flops(shape: Shape, num_tokens: int) -> float:
    """Operations of dense causal attention: two products over half of N x N."""
    return 2.0 * shape.q_heads * shape.head_dim * num_tokens**2


def method_cost(
    method: str,
    shape: Shape,
    num_tokens: int,
    *,
    density: float = 1.0,
    block_size: int = 128,
    shared_order: bool = False,
    stride: int = 8,
) -> dict[str, Work]:
    """Work of each stage of a method.

    Args:
        method: a name of ``pbs.methods.METHODS``.
        shape: heads.
        num_tokens: N, queries and keys.
        density: tiles computed / causal tiles.
        block_size: B, for methods with blocks.
        shared_order: one order per key/value head.
        stride: of antidiagonal scores.

    Returns:
        Stages "order", "selection", "gather" (where the method has them) and "attention".

    Raises:
        ValueError: a method without a count.
    """
    facts = _facts_of(method)
    tiles = -(-num_tokens // block_size)
    lists = density * shape.q_heads * tiles * (tiles + 1) / 2 * INT16
    stages: dict[str, Work] = {}
    order_heads = shape.kv_heads
    if facts.moves_keys:
        order_heads = shape.kv_heads if shared_order else shape.q_heads
        copy = shape.key_bytes(num_tokens, heads=order_heads)
        # Queries all over the prompt see half of the keys on average.
        rows = facts.order_rows(num_tokens) / 2 if facts.order_rows else block_size
        stages["order"] = Work(
            # Two passes over the keys: normalisers, then means per key. A group shares reads.
            flops=2 * 2.0 * rows * num_tokens * shape.head_dim * order_heads,
            num_bytes=2 * shape.key_bytes(num_tokens)
            + order_heads * num_tokens * (2 * FP32 + INT64),
            num_launches=6,
        )
        # Every row of both copies is read once and written once.
        stages["gather"] = Work(num_bytes=4 * copy, num_launches=2)
    selection = _SELECTION[facts.selection](
        _Sizes(shape, num_tokens, block_size, order_heads, stride)
    )
    if selection.num_launches:
        stages["selection"] = selection
    stages["attention"] = Work(
        flops=density * dense_flops(shape, num_tokens),
        num_bytes=shape.input_bytes(num_tokens) + (lists if method != "flash" else 0.0),
        num_launches=1,
    )
    return stages


def _facts_of(method: str) -> Facts:
    facts: Facts | None = METHODS.load(method).facts
    if facts is None or facts.selection not in _SELECTION:
        raise ValueError(
            f"no cost is known for method {method!r}: expected facts on its class with a selection "
            f"of {', '.join(_SELECTION)}"
        )
    return facts


def floor_ms(stages: Mapping[str, Work], rates: Rates) -> float:
    """Sum of the stages' floors."""
    return sum(work.floor_ms(rates) for work in stages.values())


def block_score_bytes(shape: Shape, num_tokens: int, block_size: int = 128) -> float:
    """Size of the block scores ``[Hq, T, T]`` in fp32."""
    tiles = -(-num_tokens // block_size)
    return float(shape.q_heads * tiles * tiles * FP32)


@dataclass(frozen=True)
class _Sizes:
    """What the cost of a selection depends on; key heads are those of k as the selector sees it."""

    shape: Shape
    num_tokens: int
    block_size: int
    key_heads: int
    stride: int

    def read_all(self) -> float:
        """q and k once, block scores once."""
        scores = block_score_bytes(self.shape, self.num_tokens, self.block_size)
        keys = self.shape.key_bytes(self.num_tokens, heads=self.key_heads)
        return self.shape.query_bytes(self.num_tokens) + keys + scores


def _no_selection(sizes: _Sizes) -> Work:  # noqa: ARG001 - nothing is looked at
    return Work()


def _pooled(sizes: _Sizes) -> Work:
    """Means of blocks of q and k, their products, softmax and lists."""
    tiles = -(-sizes.num_tokens // sizes.block_size)
    shape = sizes.shape
    return Work(2.0 * shape.q_heads * tiles * tiles * shape.head_dim, sizes.read_all(), 6)


def _antidiagonal(sizes: _Sizes) -> Work:
    """Every stride-th antidiagonal of the causal half: N/s x N/s products of length s D."""
    shape = sizes.shape
    flops = shape.q_heads * shape.head_dim * sizes.num_tokens**2 / sizes.stride
    return Work(flops, sizes.read_all(), 8)


def _sampled(sizes: _Sizes) -> Work:
    """Every s-th query against the keys it sees, and means of groups of queries and keys."""
    shape = sizes.shape
    share = 1 / SampledSelector.stride + 1 / SampledSelector.group**2
    flops = shape.q_heads * shape.head_dim * sizes.num_tokens**2 * share
    return Work(flops, sizes.read_all(), 10)


def _last_queries(sizes: _Sizes) -> Work:
    """The last 64 queries against all keys: logits written in fp32 and read twice."""
    shape = sizes.shape
    num_logits = 64.0 * shape.q_heads * sizes.num_tokens
    keys = shape.key_bytes(sizes.num_tokens)
    return Work(2 * num_logits * shape.head_dim, keys + 3 * num_logits * FP32, 12)


def _flexprefill(sizes: _Sizes) -> Work:
    """Last queries against all keys, and pooled scores, for every head."""
    return _sum(_last_queries(sizes), _pooled(sizes))


def _prism(sizes: _Sizes) -> Work:
    """Pooled scores in two bands."""
    scores = block_score_bytes(sizes.shape, sizes.num_tokens, sizes.block_size)
    return _sum(_pooled(sizes), Work(num_bytes=scores, num_launches=6))


def _sum(*works: Work) -> Work:
    return Work(
        sum(work.flops for work in works),
        sum(work.num_bytes for work in works),
        sum(work.num_launches for work in works),
    )


_SELECTION: dict[str, Callable[[_Sizes], Work]] = {
    "none": _no_selection,
    "pooled": _pooled,
    "antidiagonal": _antidiagonal,
    "sampled": _sampled,
    "last_queries": _last_queries,
    "flexprefill": _flexprefill,
    "prism": _prism,
}


def attention_memory(
    method: str,
    shape: Shape,
    num_tokens: int,
    *,
    density: float = 1.0,
    block_size: int = 128,
    shared_order: bool = False,
) -> dict[str, float]:
    """Bytes of every large tensor of one call of a method, inputs and output among them.

    What a library allocates inside a stage (a sort's scratch) is not counted.
    """
    sizes = {"q, k, v, out": float(shape.input_bytes(num_tokens))}
    if method == "flash":
        return sizes
    tiles = -(-num_tokens // block_size)
    facts = _facts_of(method)
    has_scores = facts.selection != "none"
    scores = block_score_bytes(shape, num_tokens, block_size) if has_scores else 0.0
    if facts.selection == "pooled":
        scores = min(scores, POOLED_SCORE_BYTES)  # the rows are scored and listed in parts
    if scores:
        sizes["block scores"] = scores
    # Lists are as wide as their fullest row, about twice the mean.
    sizes["lists"] = shape.q_heads * tiles * min(1.0, 2 * density) * tiles * INT16
    if facts.moves_keys:
        heads = shape.kv_heads if shared_order else shape.q_heads
        sizes["order"] = float(heads * num_tokens * INT64)
        sizes["k, v in order"] = 2.0 * shape.key_bytes(num_tokens, heads=heads)
    return sizes
