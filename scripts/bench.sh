#!/bin/sh
# bench.sh PYTHON: runs every benchmark in a process of its own; results are kept in benchmarks/results.
set -eu
python=$1
cd "$(dirname "$0")/.."
mkdir -p benchmarks/results
for file in benchmarks/bench_*.py; do
  stem=$(basename "$file" .py)
  if grep -q write_result "$file"; then # alternates its contenders and keeps the results itself
    "$python" -m pytest "$file" -q
  else
    new=benchmarks/results/.${stem#bench_}.json
    # Results of an earlier run stay until there are whole new ones.
    trap 'rm -f "$new"' EXIT
    "$python" -m pytest "$file" -q --benchmark-json="$new"
    mv "$new" "benchmarks/results/${stem#bench_}.json"
  fi
done
