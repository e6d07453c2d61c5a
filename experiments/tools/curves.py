"""The settings that draw every method's curve of accuracy against density, a line each.

    python -m experiments.tools.curves [METHOD ...]

Methods state them themselves (``Facts.curve``); ``scripts/needle_curves.sh`` runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from pbs.methods import METHODS


def curve_lines(names: Sequence[str] = ()) -> Iterator[str]:
    """Overrides of ``run.py``, such as "method=pbs method.threshold=0.5".

    Args:
        names: of methods; default: all.
    """
    for name in names or METHODS:
        facts = METHODS.load(name).facts
        for settings in facts.curve if facts else ():
            words = (f"method.{key}={value}" for key, value in settings.items())
            yield " ".join([f"method={name}", *words])


def main(names: Sequence[str]) -> None:
    """Print them."""
    sys.stdout.writelines(f"{line}\n" for line in curve_lines(names))


if __name__ == "__main__":
    main(sys.argv[1:])
