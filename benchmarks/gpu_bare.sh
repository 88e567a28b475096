#!/bin/sh
# Tests or measures the GPU backend where nothing can be fetched: gpu_bare.sh kernels|identities|bench [arguments].
# The machine's own python3 must have PyTorch for CUDA, Triton, NumPy, safetensors, pytest, pytest-timeout, hypothesis,
# CMake, ninja, scikit-build-core and nanobind; wheels of what is missing are found in .whl/ (docs/gpu.md). What is
# written lies under $OUT, else under benchmarks/results. What is still running after $BISE_SECONDS (570) is
# interrupted, so that it tells what it found. Where make can fetch packages, `make test-gpu` and `make bench-gpu` do
# the same.
set -eu
began=$(date +%s)
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
site=${BISE_SITE:-/tmp/bise-site}
pip="python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target $site"
if [ ! -e "$site/.made" ]; then
    for wheel in .whl/*.whl; do
        [ -e "$wheel" ] && $pip "$wheel"
    done
    # The page in the browser does not travel, for git ignores it, and building it takes npm and packages.
    BISE_SKIP_WEB=1 $pip --no-build-isolation .
    touch "$site/.made"
fi
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
mode=$1
shift
# Run a command until so many seconds before the end.
within() {
    less=$1
    shift
    timeout --foreground -s INT -k 20 "$((began + ${BISE_SECONDS:-570} - less - $(date +%s)))" "$@"
}
# Kernels take longer to compile than to run: by as many processes as there are cores, where pytest can.
many=$(python3 -c 'import os, xdist; print("-n", min(os.cpu_count(), 12))' 2>/dev/null || true)
# Other versions of packages may warn of what does not matter here; a test may wait for dozens of kernels.
pytest="python3 -m pytest -q -W default -p no:cacheprovider --timeout 500"
case $mode in
kernels) # ends with the table of errors, whose kernels are compiled by then, also where a test failed
    status=0
    within 60 $pytest $many -m "not slow" "$@" tests/kernels/triton tests/equivalence/test_triton_logits.py ||
        status=$?
    within 0 $pytest -s tests/kernels/triton/test_triton_table.py | tee "$out/gpu-errors.txt"
    exit "$status"
    ;;
identities)
    within 0 $pytest $many -m "not slow" -k triton "$@" tests/equivalence/test_identities.py \
        tests/equivalence/test_matrix.py
    ;;
bench) within 0 python3 benchmarks/gpu.py --out "$out/gpu.json" "$@" ;;
*)
    echo "usage: gpu_bare.sh kernels|identities|bench [arguments of pytest or of gpu.py]" >&2
    exit 2
    ;;
esac
