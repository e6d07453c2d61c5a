#!/usr/bin/env bash
# Time and memory: the counterpart of the paper's efficiency experiments.
#
#   scripts/eval_efficiency.sh table7            attention alone, Table 7 (one GPU)
#   scripts/eval_efficiency.sh figure4           time to first token, Figure 4 (one GPU)
#   scripts/eval_efficiency.sh methods           every method's stages and break-even length
#   scripts/eval_efficiency.sh all DIR           all GPU numbers, into DIR
#
# Further words are handed to run.py, as in: scripts/eval_efficiency.sh table7 bench.lengths=[8192]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

what=${1:?say what: table7, figure4, methods or all}
shift
case $what in
  table7 | figure4) exec "$python" run.py experiment="$what" "$@" ;;
  methods) exec "$python" run.py experiment=time_methods "$@" ;;
  all)
    out=${1:-outputs/bench_gpu}
    exec "$python" -m experiments.tools.bench --on gpu --out "$out" "${@:2}"
    ;;
  *)
    echo "unknown: $what; valid: table7, figure4, methods, all" >&2
    exit 2
    ;;
esac
