#!/bin/bash
# Runs the kernel tests on a GPU machine where the package is not installed, in $1 processes; further arguments go to pytest.
set -u
cd "$(dirname "$0")/../.."
[ -e anchorscope/kernels ] || ln -s ../kernels anchorscope/kernels
shards=$1; shift
logs=${OUT:-/tmp}
pids=()
for ((i = 0; i < shards; i++)); do
  ANCHORSCOPE_SHARD=$i/$shards PYTHONPATH=$PWD:${PYTHONPATH:-} OMP_NUM_THREADS=1 \
    python3 -m pytest -q -p no:cacheprovider -m gpu tests/kernels "$@" >"$logs/shard$i.log" 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
grep -h -E "^(FAILED|ERROR)" "$logs"/shard*.log | head -40
tail -q -n 1 "$logs"/shard*.log
