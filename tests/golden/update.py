"""Writes ``needle.json`` anew: for a change that is meant to move numbers.

    python -m tests.golden.update
    make golden

Prints what moved, and refuses numbers that hang on rounding.
"""

import sys

from tests.golden.measure import DIGITS, PATH, SEED, differences, measure, read, write

COMMAND = "make golden"
# Ten times what fp32 rounds by: between machines sums differ by less.
NOISE = 1e-6


def main() -> int:
    """Exit status 1: nothing is written."""
    numbers = measure()
    unstable = differences(numbers, measure(noise=NOISE, noise_seed=1))
    if unstable:
        print(
            f"With weights changed by {NOISE:g} of their size these numbers move, as they may on "
            f"another machine:\n{chr(10).join(unstable)}\nNothing is written; choose other prompts "
            f"by another SEED (now {SEED}) in tests/golden/measure.py"
        )
        return 1
    moved = differences(read(), numbers) if PATH.exists() else []
    write(numbers)
    print("\n".join(moved) if moved else f"no number moved in its {DIGITS} digits")
    print(f"{len(numbers)} settings in {PATH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
