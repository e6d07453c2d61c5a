"""The safety gate's look at plans as a method makes them: causality, and the kernel's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from experiments.gate.report import GateError
from pbs import AttentionMethod, CallRecord, block_sparse_attention
from pbs.ops.block_sparse_attention import AS_GIVEN

# Largest token mask (heads x N x N) to write out; longer plans are only validated.
MAX_MASK_ELEMENTS = 1 << 28
# Layers whose plans are examined: the first and the last few that run sparse.
NUM_PLANS = 4


class PlanExaminer:
    """Looks at sparse calls as they happen and keeps only numbers."""

    def __init__(self) -> None:
        self.num_plans = 0
        self.num_outputs = 0
        self.num_leaks = 0
        self.kernel_error = 0.0

    def examine(self, record: CallRecord, backend: str, precision: str) -> None:
        """Causality of the plan; output of the kernel for it, with the keys as values."""
        plan, q, k = record.plan, record.q, record.k
        if plan.is_dense or self.num_plans >= NUM_PLANS:
            return
        self.num_plans += 1
        try:
            plan.validate()
        except ValueError as error:
            raise GateError("future", 1.0, 0.0, str(error)) from error
        if q.shape[1] * q.shape[2] * k.shape[2] > MAX_MASK_ELEMENTS:
            return
        seen = plan.token_mask()
        positions = torch.arange(q.shape[2], device=q.device) + plan.grid.offset
        future = torch.arange(k.shape[2], device=q.device) > positions[:, None]
        self.num_leaks += int((seen & future).sum())
        own = seen.gather(3, positions[:, None].expand(*seen.shape[:3], 1))
        self.num_leaks += int((~own).sum())
        settings = {"scale": record.scale, "precision": precision}
        out = block_sparse_attention(q, k, k, plan, backend=backend, **settings)
        rounded = None
        if precision != AS_GIVEN:
            rounded = block_sparse_attention(
                q, k, k, plan, backend="reference", **settings
            ).double()
        self.num_outputs += 1
        error = _kernel_error(out, record, seen, rounded)
        self.kernel_error = max(self.kernel_error, error)


def _kernel_error(out: Tensor, record: CallRecord, seen: Tensor, rounded: Tensor | None) -> float:
    """Error of the output over its budget: twice that of eager attention in the same precision.

    Args:
        out: the kernel's.
        record: of the call.
        seen: the plan's pairs.
        rounded: eager attention; None: in the dtype of ``out``.
    """
    exact = _masked_attention(record, seen, torch.float64)
    if rounded is None:
        rounded = _masked_attention(record, seen, out.dtype)
    # Probabilities and the online softmax round a few times more than one matrix product.
    band = 4 * torch.finfo(out.dtype).eps * float(exact.abs().max())
    budget = 2 * float((rounded - exact).abs().max()) + band
    return float((out.double() - exact).abs().max()) / budget


def _masked_attention(record: CallRecord, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention over the named pairs in a dtype, head by head, as fp64."""
    q, k = record.q.to(dtype), record.k.to(dtype)
    groups = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        keys = k[:, head // groups]
        logits = (q[:, head] @ keys.transpose(-1, -2)) * record.scale
        logits = logits.masked_fill(~seen[:, head], float("-inf"))
        heads.append((logits.softmax(dim=-1) @ keys).double())
    return torch.stack(heads, dim=1)


@contextmanager
def recording(method: AttentionMethod, examiner: PlanExaminer) -> Iterator[None]:
    """Let the examiner hear the method's calls beside whoever listens already."""
    previous = method.recorder

    def record(call: CallRecord) -> None:
        examiner.examine(call, method.backend, method.precision)
        if previous is not None:
            previous(call)

    method.recorder = record
    try:
        yield
    finally:
        method.recorder = previous
