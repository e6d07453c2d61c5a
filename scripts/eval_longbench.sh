#!/usr/bin/env bash
# LongBench, both models and all methods of the PBS paper's table; finished runs are skipped.
#   bash scripts/eval_longbench.sh [overrides, such as bench.limit=20 bench.data_dir=DIR]
# Models on this machine: MODELS="llama31 qwen25" PYTHON=.venv/bin/python bash scripts/eval_longbench.sh
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
status=0
for model in ${MODELS:-llama31 qwen25}; do
  "$python" run.py experiment="longbench_$model" "$@" || status=1
done
exit $status
