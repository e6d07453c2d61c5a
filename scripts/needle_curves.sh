#!/usr/bin/env bash
# Accuracy against density: every method at the settings of its curve, dense beside them.
#   bash scripts/needle_curves.sh [overrides, such as bench.lengths=[4096,8192] bench.num_samples=2]
# It ends with outputs/needle/MODEL/accuracy_density.png; `make leaderboard` makes a table.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
status=0
run() { "$python" run.py "$@" bench=needle || status=1; }

run method=flash "$@"
# What each method says of itself (Facts.curve): a line of settings per point.
while read -r -a settings; do
  run "${settings[@]}" "$@"
done < <("$python" -m experiments.tools.curves)
exit $status
