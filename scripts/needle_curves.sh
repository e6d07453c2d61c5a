#!/usr/bin/env bash
# Accuracy against density: every method at three settings of its knob, dense beside them.
#   bash scripts/needle_curves.sh [overrides, such as bench.lengths=[4096,8192] bench.num_samples=2]
# It ends with outputs/needle/MODEL/accuracy_density.png; `make leaderboard` makes a table.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
status=0
run() { "$python" run.py "$@" bench=needle || status=1; }

run method=flash "$@"
run -m method=pbs,pbs_plus,meanpool,xattention,prism method.threshold=0.5,0.7,0.9 "$@"
run -m method=random_blocks method.density=0.2,0.35,0.5 "$@"
run -m method=flexprefill method.gamma=0.5,0.7,0.9 "$@"
# Sizes that go together: vertical and slash lines, first and last tokens.
for sizes in "16 64" "64 256" "256 1024"; do
  read -r vertical slash <<<"$sizes"
  run method=minference method.vertical_size="$vertical" method.slash_size="$slash" "$@"
done
for sizes in "128 512" "256 1024" "512 2048"; do
  read -r first last <<<"$sizes"
  run method=streaming method.n_init="$first" method.n_local="$last" "$@"
done
exit $status
