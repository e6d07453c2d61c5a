"""The base class of every attention method. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from pbs.checks import check_choice, check_integer
from pbs.methods.crossover import find_crossover, setting_of
from pbs.methods.facts import Facts
from pbs.ops.block_sparse_attention import (
    AS_GIVEN,
    FP8,
    PRECISIONS,
    Backend,
    block_sparse_attention,
)
from pbs.ops.dense import dense_attention
from pbs.ops.grid import BlockGrid, Geometry
from pbs.ops.inputs import (
    as_given,
    check_attention_inputs,
    needs_gradient,
    refuse_gradient,
)
from pbs.ops.plan import AttentionPlan
from pbs.ops.stages import stage

# Why a decoding step is dense, in records and reports.
DECODE = "decode"


@dataclass(frozen=True)
class CallRecord:
    """What one call of a method saw and decided. It refers to q and k: use them, do not keep them.

    Attributes:
        layer_idx: the layer, if the caller said.
        q: ``[Z, Hq, Nq, D]`` without padding.
        k: ``[Z, Hkv, Nk, D]`` without padding.
        scale: factor of the logits.
        plan: what was computed; ``plan.reason`` is "" if the call ran sparse, else says why dense.
    """

    layer_idx: int | None
    q: Tensor
    k: Tensor
    scale: float
    plan: AttentionPlan

    @property
    def is_decode(self) -> bool:
        """Whether the call was a decoding step, which has no part in density or coverage."""
        return self.plan.reason == DECODE


Recorder = Callable[[CallRecord], None]


@dataclass(frozen=True)
class Call:
    """What a method selects for: one call on checked tensors, without padding.

    Attributes:
        q: ``[Z, Hq, Nq, D]``, after RoPE.
        k: ``[Z, Hkv, Nk, D]``, Hq a multiple of Hkv, Nk >= Nq; queries are the last Nq tokens.
        scale: factor of the logits, positive.
        layer_idx: for methods with settings per layer; None if the caller did not say.
    """

    q: Tensor
    k: Tensor
    scale: float
    layer_idx: int | None = None

    def grid(self, tile: int) -> BlockGrid:
        """The tiles of this call, ``tile`` queries by ``tile`` keys."""
        return BlockGrid(self.q.shape[2], self.k.shape[2], tile, tile)

    def dense(self, reason: str, *, tile: int = 128) -> AttentionPlan:
        """A plan of plain causal attention; ``reason`` says why."""
        heads = self.q.shape[:2]
        return AttentionPlan.dense(self.grid(tile), *heads, device=self.q.device, reason=reason)


@dataclass(frozen=True)
class Knob:
    """The parameter that trades accuracy for speed, for comparisons at equal density or coverage.

    Attributes:
        name: of the parameter.
        low: smallest useful value, at which the method is at its sparsest (or densest).
        high: largest useful value, at the other end.
        is_integer: whether the parameter is a count.
        increases_density: whether larger values compute more.
        fixed: other parameters that must have these values for the knob to mean something.
        proportional: counts that keep their proportion to the knob, rounded down.
    """

    name: str
    low: float
    high: float
    is_integer: bool = False
    increases_density: bool = True
    fixed: Mapping[str, object] = field(default_factory=dict)
    proportional: tuple[str, ...] = ()


@dataclass(kw_only=True)
class AttentionMethod:
    """Decides what to compute; the kernels of ``pbs.ops`` compute it.

    A method is a dataclass: its fields are its parameters, with their defaults, checked in
    ``__post_init__``. It overrides :meth:`select` and nothing else.

    Args:
        backend: who computes a sparse plan, see :class:`pbs.ops.block_sparse_attention.Backend`:
            "auto", "reference", "cpu", "triton" or "hopper".
        precision: of the products of a sparse plan: "as_given", of the tensors' dtype, or "fp8",
            eight bits on an H100 or H200, see :func:`pbs.ops.block_sparse_attention` (backend
            "reference" emulates it anywhere, with N x N memory). Selection, and calls that run
            dense, stay as given.
        dense_below: calls with fewer keys run dense, where selecting costs more than it saves; such
            calls are recorded as dense. 0: the method always decides itself. "auto": what was
            measured for this device, head shape and method at this very setting, at the density it
            then had by itself (:mod:`pbs.methods.crossover`); results then depend on the device, so
            ask for it where speed is what counts.
        decode_below: calls with fewer queries than this on a filled cache (more keys than queries)
            are decoding steps: they run dense and are recorded as "decode". Default: one tile. A
            few queries hide too little to be worth a selection, and an answer's tokens then do not
            depend on how many are computed at once. The last part of a prefill in chunks is such a
            step if it is that short. 0: the method decides for any number of queries (a patched
            model computes single queries dense in any case).

    ``recorder`` is no parameter: a function set on it hears every call, in whatever thread. Copies,
    pickled ones too, have none.

    ``facts`` are what pictures, the cost model and the tests must know of it.

    ``knob`` is the parameter by which methods are compared at equal density or coverage; None if
    there is none.
    """

    knob: ClassVar[Knob | None] = None
    facts: ClassVar[Facts | None] = None

    backend: str = "auto"
    precision: str = AS_GIVEN
    dense_below: int | str = 0
    decode_below: int = 128
    recorder: Recorder | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the parameters; subclasses call ``super().__post_init__()`` first."""
        names = [member.value for member in Backend]
        if self.backend not in names:
            raise ValueError(f"unknown backend {self.backend!r}; valid: {', '.join(names)}")
        check_choice(self.precision, PRECISIONS, name="precision")
        if self.precision == FP8 and self.backend in (Backend.CPU.value, Backend.TRITON.value):
            raise ValueError(
                f"precision='fp8' has no kernel on backend {self.backend!r}: use 'auto' or "
                "'hopper' on an H100 or H200, or 'reference', which emulates it"
            )
        check_integer(self.decode_below, name="decode_below", smallest=0)
        if self.dense_below == "auto":
            return
        if isinstance(self.dense_below, bool) or not isinstance(self.dense_below, int):
            raise TypeError(f"dense_below must be an integer or 'auto', got {self.dense_below!r}")
        if self.dense_below < 0:
            raise ValueError(f"dense_below must be at least 0 keys, got {self.dense_below}")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "recorder": None}

    def select(self, call: Call) -> AttentionPlan:
        """What to compute for checked queries and keys: the one thing a method has to say.

        Autograd and autocast are off.
        """
        raise NotImplementedError(f"{type(self).__name__} selects nothing: give it select(call)")

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        layer_idx: int | None = None,
    ) -> AttentionPlan:
        """What to compute for these queries and keys.

        Args:
            q: ``[Z, Hq, Nq, D]``, after RoPE.
            k: ``[Z, Hkv, Nk, D]``, not repeated, Nk >= Nq; queries are the last Nq tokens.
            scale: factor of the logits; default 1 / sqrt(D).
            layer_idx: for methods with settings per layer.

        Raises:
            ValueError: shapes or devices do not fit, or the scale is not positive.
            TypeError: dtypes differ, or something is no dense tensor.
        """
        check_attention_inputs(q, k)
        _check_scale(scale)
        # What is selected is no function that has a gradient.
        with torch.no_grad(), as_given(q):
            return self.select(
                Call(q, k, q.shape[3] ** -0.5 if scale is None else scale, layer_idx)
            )

    def check_model(self, *, num_layers: int, num_heads: int | None) -> None:
        """Refuse a model that the parameters were not made for; the patch asks before it begins.

        Methods with settings per layer or head override this; others fit every model.

        Args:
            num_layers: layers of the model, with and without attention.
            num_heads: query heads of each; None if it differs between layers.

        Raises:
            ValueError: the parameters are for other numbers; the message gives both.
        """

    def densest(self) -> AttentionMethod | None:
        """This method at its most permissive setting, where it must equal dense attention.

        Methods with a ``threshold`` get it set to 1; others override this.

        Returns:
            A new method without a recorder; None if no setting equals dense attention.
        """
        if not any(parameter.name == "threshold" for parameter in fields(self)):
            return None
        return replace(self, threshold=1.0)  # type: ignore[call-arg]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layer_idx: int | None = None,
        geometry: Geometry | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Causal attention of this method.

        Args:
            q: ``[Z, Hq, Nq, D]``, after RoPE.
            k: ``[Z, Hkv, Nk, D]``, Hq a multiple of Hkv.
            v: ``[Z, Hkv, Nk, D]``.
            scale: factor of the logits; default 1 / sqrt(D).
            layer_idx: for methods with settings per layer, and the record.
            geometry: padding and the slot of the first query; default: no padding, queries last.
            recorder: hears this call alone, before the method's own ``recorder``, which hears every
                call. Calls in several threads, or by several models, thus stay apart.

        Returns:
            ``[Z, Hq, Nq, D]`` in q's dtype, also under autocast; zeros for padding. A padded batch
            gives each sequence what it gets alone.

        Raises:
            ValueError: shapes or devices do not fit each other or the geometry, or the scale is not
                positive.
            TypeError: dtypes differ, or a tensor or the geometry is something else.
            NotImplementedError: grad mode is on, q, k or v requires a gradient, and the plan is
                sparse: only backend "reference" has its gradients. Dense plans have theirs.
        """
        if torch.compiler.is_compiling() and geometry is None:
            from pbs import compiled  # which loads the compiler

            if recorder is not None or needs_gradient(q, k, v):
                settings = {"scale": scale, "layer_idx": layer_idx, "recorder": recorder}
                return compiled.outside(self, q, k, v, **settings)
            out: Tensor = compiled.attention(q, k, v, compiled.handle_of(self), scale, layer_idx)
            return out
        check_attention_inputs(q, k, v)
        if q.is_meta:
            raise TypeError("q, k and v lie on the meta device: there are no values to attend to")
        _check_scale(scale)
        if geometry is not None:
            _check_geometry(geometry, q, k)
        if geometry is None or geometry.is_unpadded:
            return self._attend(q, k, v, scale, layer_idx, recorder)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for members, rows, slots in geometry.spans():
            # A slice is a view; a list of indices copies, and waits for the device.
            is_run = len(members) == members[-1] - members[0] + 1
            which = slice(members[0], members[-1] + 1) if is_run else members
            part = (q[which, :, rows], k[which, :, slots], v[which, :, slots])
            out[which, :, rows] = self._attend(*part, scale, layer_idx, recorder)
        return out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        layer_idx: int | None,
        recorder: Recorder | None,
    ) -> Tensor:
        """Plan and compute sequences of one length without padding."""
        if scale is None:
            scale = q.shape[3] ** -0.5
        reason = self.reason_to_run_dense(q, k)
        if reason:
            plan = Call(q, k, scale, layer_idx).dense(reason)
        else:
            with stage("selection"):
                plan = self.plan(q, k, scale=scale, layer_idx=layer_idx)
        if not plan.is_dense and self.backend != Backend.REFERENCE.value:
            refuse_gradient(q, k, v)  # before the call is recorded as one that ran
        record = CallRecord(layer_idx, q, k, scale, plan)
        for hear in (recorder, self.recorder):
            if hear is not None:
                hear(record)
        if plan.is_dense:
            with stage("attention"):
                return self.compute_dense(q, k, v, scale=scale)
        return block_sparse_attention(
            q, k, v, plan, scale=scale, backend=self.backend, precision=self.precision
        )

    def reason_to_run_dense(self, q: Tensor, k: Tensor) -> str:
        """Why a call with these shapes runs dense, whatever the method plans; "" if it does not.

        ``DECODE`` for a decoding step, else why so many keys are too few for selecting to pay.
        """
        if self.is_decode_step(q.shape[2], k.shape[2]):
            return DECODE
        if isinstance(self.dense_below, int):
            is_short = k.shape[2] < self.dense_below
            return f"fewer keys than dense_below={self.dense_below}" if is_short else ""
        found = find_crossover(q.device, q.shape[1], k.shape[1], q.shape[3], setting_of(self))
        if found is None or k.shape[2] >= found.min_keys:
            return ""
        return f"fewer keys than the measured crossover {found.min_keys}"

    def is_decode_step(self, num_queries: int, num_keys: int) -> bool:
        """Whether a sequence's call is a decoding step, see ``decode_below``.

        Args:
            num_queries: Nq of the sequence, without padding.
            num_keys: Nk of the sequence up to its last query, without padding.
        """
        return num_queries < num_keys and num_queries < self.decode_below

    def compute_dense(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Carry out a dense plan, by the fastest dense kernel; a method may choose another."""
        return dense_attention(q, k, v, scale=scale)


def _check_scale(scale: object) -> None:
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (is_number and 0 < float(scale) < math.inf):  # type: ignore[arg-type]
        raise ValueError(
            f"scale, the factor of the logits, must be a positive number, got {scale!r}; None "
            "means 1 / sqrt(head dim)"
        )


def _check_geometry(geometry: object, q: Tensor, k: Tensor) -> None:
    if not isinstance(geometry, Geometry):
        raise TypeError(
            f"expected geometry as a pbs.Geometry, got {type(geometry).__name__}; make one with "
            "Geometry.from_padding_mask(mask, num_queries=...)"
        )
    expected = (q.shape[0], q.shape[2], k.shape[2])
    got = (len(geometry.starts), geometry.num_queries, geometry.num_keys)
    if got != expected:
        raise ValueError(
            f"the geometry is for (sequences, queries, keys) = {got}, the tensors have {expected}"
        )
