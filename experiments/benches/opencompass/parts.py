"""The data sets of a bench of OpenCompass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One data set of OpenCompass.

    Attributes:
        key: unique in the bench; the first part of its samples' ids.
        labels: what every record and every row of results says about it.
    """

    key: str
    labels: Mapping[str, Any]
