#!/usr/bin/env bash
# On a machine with a GPU, nvcc and a Python environment that has the build and test tools: builds both extensions
# without network, runs the GPU tests, the sanitizers over the CUDA kernels where compute-sanitizer is on PATH, and every
# bench, all within nine minutes. Usage: bench/gpu.sh OUT_DIR
#
# Writes OUT_DIR/log.txt (all output), rows.json (what was measured) and table.md. A step that fails does not stop the
# others; the exit status is 1 if any did, or was stopped at its limit. Steps for which no time is left are named.
set -uo pipefail
readonly DEADLINE=530 # seconds from the start
readonly BENCHES="peak gram cross_gram assemble residual spectral select blend ranks cholesky regmean"
readonly BENCH_LIMIT=60

out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT_DIR}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
export PYTHONUNBUFFERED=1
rows=$(mktemp -d) || exit 2
trap 'rm -rf "$rows"' EXIT
: >"$out/log.txt"
failed=() left_out=()

say() { echo "$*" | tee -a "$out/log.txt"; }

# step NAME SECONDS COMMAND...: runs it under a limit, its output on the screen and in the log.
step() {
  local name=$1 limit=$2 status
  shift 2
  local remaining=$((DEADLINE - SECONDS))
  if ((remaining < 10)); then
    left_out+=("$name")
    say "== $name: left out, no time"
    return
  fi
  ((limit = limit < remaining ? limit : remaining))
  say "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  if ((status == 124 || status == 137)); then
    failed+=("$name (stopped after $limit s)")
  elif ((status != 0)); then
    failed+=("$name (exit status $status)")
  fi
}

step build 200 "$python" -m pip install --no-index --no-build-isolation --no-deps --editable . \
  -Ccmake.define.BMM_CUDA=ON
step diagnostics 60 "$python" -m bmm_engine
step tests 200 "$python" -m pytest -q -m gpu
if command -v compute-sanitizer >/dev/null; then
  # Without torch's caching allocator, so that a read past the end of a tensor is one past the end of an allocation.
  for tool in memcheck racecheck; do
    step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20 \
      "$python" -m pytest -q -m gpu -p no:cacheprovider tests/ops/test_cuda_wrappers.py tests/ops/test_select.py \
      -k '(kernel and ragged and not large) or (histograms and cuda)'
  done
else
  left_out+=(memcheck racecheck)
  say "== memcheck, racecheck: left out, compute-sanitizer is not on PATH"
fi
for name in $BENCHES; do
  step "bench $name" "$BENCH_LIMIT" "$python" -m bench "$name" --device cuda --json "$rows/$name.json"
done

files=()
for name in $BENCHES; do
  [[ -f $rows/$name.json ]] && files+=("$rows/$name.json")
done
if ((${#files[@]})); then
  "$python" -m bench table "${files[@]}" >"$out/table.md" || failed+=("table")
  "$python" -c 'import json, sys; print(json.dumps([row for name in sys.argv[1:] for row in json.load(open(name))], indent=1))' \
    "${files[@]}" >"$out/rows.json" || failed+=("rows.json")
  cat "$out/table.md"
else
  failed+=("no bench measured anything")
fi
((${#left_out[@]})) && say "left out: $(printf '%s; ' "${left_out[@]}")"
if ((${#failed[@]})); then
  say "FAILED: $(printf '%s; ' "${failed[@]}")"
  exit 1
fi
say "all passed in $SECONDS s"
