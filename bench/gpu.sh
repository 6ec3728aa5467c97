#!/usr/bin/env bash
# Everything a machine with a GPU can tell, in under ten minutes: builds the CUDA library for this GPU, tests it, runs
# compute-sanitizer on a small selection, and measures. Logs and JSON are left in $OUT (default build/gpu).
#
#   bench/gpu.sh                       PYTHON=python3.12 OUT=/tmp/gpu bench/gpu.sh
#   WHEELS=wheels/ bench/gpu.sh        a machine without network: every package comes from that folder
#
# A stage that fails is recorded and the next ones still run; the exit status is 1 if any did.
# shellcheck disable=SC2329  # the functions are called by name, through stage
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-$PWD/build/gpu-venv}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/stages.txt"
failed=0
DEADLINE=${DEADLINE:-570}  # seconds

stage() {  # stage NAME SECONDS COMMAND...: runs it with a time limit, its output in NAME.log
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  echo "== $name"
  ((limit > DEADLINE - SECONDS)) && limit=$((DEADLINE - SECONDS > 1 ? DEADLINE - SECONDS : 1))
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  if ((status)); then
    failed=$((failed + 1))
    tail -n 15 "$OUT/$name.log"
  fi
  echo "$name: $( ((status)) && echo "FAILED ($status)" || echo ok), $((SECONDS - began)) s" | tee -a "$OUT/stages.txt"
  return "$status"
}
finish() {
  echo "$failed stages failed in ${SECONDS} s; logs in $OUT" | tee -a "$OUT/stages.txt"
  exit "$((failed > 0))"
}

has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
environment() {
  # The machine's own torch is used when it sees the GPU; otherwise one is fetched.
  if has_cuda_torch "$PYTHON"; then
    "$PYTHON" -m venv --system-site-packages "$VENV"
  else
    "$PYTHON" -m venv "$VENV"
  fi || return
  local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  [[ -z ${WHEELS:-} ]] || pip+=(--no-index --find-links "$WHEELS")
  has_cuda_torch "$VENV/bin/python" || "${pip[@]}" "torch>=2.10" || return
  "${pip[@]}" "scikit-build-core>=0.11" cmake ninja "numpy>=1.26" "pytest>=8" "hypothesis>=6.100" "click>=8.1" \
    "rich>=13" "matplotlib>=3.8" "scipy>=1.11" || return
  has_cuda_torch "$VENV/bin/python" || { echo "torch finds no GPU here" && return 1; }
}
build() {
  PATH="$VENV/bin:$PATH" "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --no-build-isolation --no-deps . -C build-dir=build/gpu-cmake -C cmake.define.GRADOPS_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native -C cmake.define.GRADOPS_NUMPY=OFF -C cmake.define.GRADOPS_JAX=OFF
}
sanitize() {  # only kernels of ours: torch's would take most of the time
  "$sanitizer" --tool "$1" --kernel-name kns=gradops --target-processes all --error-exitcode 86 \
    "$VENV/bin/python" -m pytest -x tests -k "cuda and ${SELECTION:-test_matches} and not slow"
}
export -f environment build sanitize has_cuda_torch
export PYTHON VENV

if command -v nvcc >/dev/null; then
  export CUDACXX=${CUDACXX:-$(command -v nvcc)}
elif [[ -x /usr/local/cuda/bin/nvcc ]]; then
  export CUDACXX=${CUDACXX:-/usr/local/cuda/bin/nvcc}
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
export sanitizer
{ nvidia-smi; "${CUDACXX:-nvcc}" --version; } >"$OUT/machine.log" 2>&1

stage environment 180 bash -c environment || finish
stage build 240 bash -c build || finish
stage info 60 "$VENV/bin/gradops" info
stage tests 150 "$VENV/bin/python" -m pytest tests -k "cuda and not slow"
if [[ -n $sanitizer ]]; then
  stage memcheck 75 bash -c "sanitize memcheck"
  stage racecheck 75 bash -c "sanitize racecheck"
else
  echo "memcheck, racecheck: not run, no compute-sanitizer here" | tee -a "$OUT/stages.txt"
fi
for family in rl linalg optim ot quant curvature; do
  stage "bench-$family" 90 "$VENV/bin/gradops" bench $family --device cuda --json "$OUT/$family.json" --plot "$OUT/$family.png"
done
finish
