"""What ran sparse and what ran dense, per layer. Knows nothing of transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from threading import Lock

import torch
from torch import Tensor

from pbs.methods.base import DECODE, CallRecord

# One for all counters, which can so be copied and pickled; it is held for a few additions.
_counting = Lock()


@dataclass(frozen=True)
class LayerReport:
    """One layer since the patch was applied or reset.

    Sequences of different length in a padded batch are separate calls.

    Attributes:
        layer_idx: the layer.
        sparse_calls: prefill calls that ran sparse.
        dense_calls: dense calls by reason; "decode" counts decoding steps: single tokens, and calls
            with fewer new tokens than the method's ``decode_below`` on a filled cache.
        density: tiles computed / tiles dense causal attention computes, mean over the sequences of
            all prefill calls and over heads; a dense call counts 1. None without prefill.
    """

    layer_idx: int
    sparse_calls: int
    dense_calls: dict[str, int]
    density: float | None

    @property
    def was_called(self) -> bool:
        """False when the layer's attention never reached the patch."""
        return self.sparse_calls > 0 or bool(self.dense_calls)


@dataclass(frozen=True)
class PatchReport:
    """All patched layers, in order, also those that were never called."""

    layers: list[LayerReport]

    @property
    def density(self) -> float | None:
        """Mean over the layers that saw a prefill; None if none did."""
        values = [layer.density for layer in self.layers if layer.density is not None]
        return sum(values) / len(values) if values else None

    @property
    def num_sparse_layers(self) -> int:
        """Layers with at least one sparse call."""
        return sum(layer.sparse_calls > 0 for layer in self.layers)

    @property
    def sparse_calls(self) -> int:
        """Sparse calls of all layers."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Dense calls of all layers by reason."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for reason, count in layer.dense_calls.items():
                total[reason] = total.get(reason, 0) + count
        return total

    @property
    def uncalled_layers(self) -> list[int]:
        """Layers whose attention never reached the patch."""
        return [layer.layer_idx for layer in self.layers if not layer.was_called]

    def __str__(self) -> str:
        """A table: a line per layer, and one for all."""
        rows = [("layer", "sparse", "dense", "density", "dense because of")]
        rows += [
            (
                str(layer.layer_idx),
                str(layer.sparse_calls),
                str(sum(layer.dense_calls.values())),
                _number(layer.density),
                _reasons(layer.dense_calls) if layer.was_called else "never called",
            )
            for layer in self.layers
        ]
        dense = self.dense_calls
        calls = (str(self.sparse_calls), str(sum(dense.values())))
        rows.append(("all", *calls, _number(self.density), _reasons(dense)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([*map(str.rjust, row[:4], widths), row[4]]).rstrip() for row in rows
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data for a JSON file."""
        return {
            "density": self.density,
            "num_layers": len(self.layers),
            "num_sparse_layers": self.num_sparse_layers,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "uncalled_layers": self.uncalled_layers,
            "layers": [asdict(layer) for layer in self.layers],
        }


def _number(density: float | None) -> str:
    return "-" if density is None else f"{density:.3f}"


def _reasons(dense_calls: dict[str, int]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in dense_calls.items())


@dataclass
class LayerCounter:
    """Counts the calls of one layer; densities stay on the device until the report is read.

    Threads may count and read at once.
    """

    layer_idx: int
    sparse_calls: int = 0
    dense_calls: dict[str, int] = field(default_factory=dict)
    _density_sum: Tensor | float = 0.0
    _num_sequences: int = 0

    def add_record(self, record: CallRecord) -> None:
        """Count a call of a method."""
        if record.is_decode:
            self.add_decode()
            return
        plan = record.plan
        # Sums as fp64 on the device: no synchronisation, and no drift over a long run.
        density = plan.density().mean(dim=1, dtype=torch.float64).sum()
        with _counting:
            if plan.is_dense:
                self._count_dense(plan.reason or "dense plan")
            else:
                self.sparse_calls += 1
            self._density_sum = self._density_sum + density
            self._num_sequences += plan.batch_size

    def add_dense(self, reason: str, *, num_sequences: int) -> None:
        """Count a prefill call that the plug-in itself computed dense."""
        with _counting:
            self._count_dense(reason)
            self._density_sum = self._density_sum + float(num_sequences)
            self._num_sequences += num_sequences

    def add_decode(self) -> None:
        """Count a decoding step; it has no part in the density."""
        with _counting:
            self._count_dense(DECODE)

    def report(self) -> LayerReport:
        """The counts so far (one synchronisation with the device)."""
        with _counting:
            total, num_sequences = self._density_sum, self._num_sequences
            sparse_calls, dense_calls = self.sparse_calls, dict(self.dense_calls)
        density = float(total) / num_sequences if num_sequences else None
        return LayerReport(self.layer_idx, sparse_calls, dense_calls, density)

    def _count_dense(self, reason: str) -> None:
        self.dense_calls[reason] = self.dense_calls.get(reason, 0) + 1
