"""What the safety gate says: a report of its checks, or an error that names the one that failed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


class GateError(RuntimeError):
    """A check failed: the method, its kernel or the plug-in is wrong on this model.

    Attributes:
        check: the check that failed.
        measured: its number.
        allowed: the largest number that would have passed.
    """

    def __init__(self, check: str, measured: float, allowed: float, meaning: str) -> None:
        self.check, self.measured, self.allowed = check, measured, allowed
        super().__init__(
            f"safety gate: check {check!r} failed: {meaning}: measured {measured:.3g}, allowed "
            f"{allowed:.3g}. Do not trust results of this combination; try backend='reference', "
            "the method 'flash' and attn_implementation='sdpa' to find the part that is wrong"
        )


@dataclass(frozen=True)
class CheckReport:
    """One check: passed if ``measured <= allowed``."""

    name: str
    measured: float
    allowed: float
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class GateReport:
    """A gate that was passed.

    Attributes:
        num_tokens: length of the prompt.
        ran_sparse: whether the method ran sparse at that length; if not, ``kernel`` and ``future``
            saw no sparse plan.
        densest: what stood for the method at its most permissive setting.
        sensitivity: change of the logits when the input moves by one rounding step.
        checks: in the order they ran.
        seconds: all together.
    """

    num_tokens: int
    ran_sparse: bool
    densest: str
    sensitivity: float
    checks: list[CheckReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Always true: :func:`run_gate` raises otherwise."""
        return all(check.measured <= check.allowed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**asdict(self), "passed": self.passed}
