"""How long threads of OpenMP spin when they have nothing to do; set before torch is loaded.

PyTorch's Linux wheels come with GNU's OpenMP, whose threads spin for milliseconds at the end of
each parallel piece. Where another process has the processor that a sibling thread needs, that time
is lost with every operation. ``SPIN_COUNT`` lets them spin for microseconds, then sleep.
"""

from __future__ import annotations

import os
import sys

# Measured on 2 processors, prefill of the embedded model by PBS at 1024 and 4096 tokens, ms: alone
# 16 and 107 (default 16 and 101, OMP_WAIT_POLICY=PASSIVE 26 and 127); beside a process that keeps
# both busy, slowest of 20 calls: 38 to 75 and 204 to 402 (default 228 to 459 and 562 to 621).
SPIN_COUNT = 1000
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def limit_spinning() -> None:
    """Set ``GOMP_SPINCOUNT``, unless the user chose, or torch has been loaded and read it.

    What holds stands in env.json ("variables").
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
