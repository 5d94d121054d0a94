#!/usr/bin/env bash
# On a machine with a GPU, nvcc and a Python environment that has the build tools: builds both extensions without
# network, runs the GPU tests and the GPU benches. Usage: bench/gpu.sh OUT_DIR
set -euo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT_DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -m pip install --no-index --no-build-isolation --no-deps --editable . -Ccmake.define.BMM_CUDA=ON
"$python" -m bmm_engine | tee "$out/diagnostics.txt"
"$python" -m pytest -q -m gpu | tee "$out/tests.txt"
"$python" -m bench assemble --device cuda --json "$out/assemble.json" | tee "$out/assemble.txt"
