#!/bin/sh
# Tests or measures the GPU backend where nothing can be fetched: gpu_bare.sh kernels|identities|bench [arguments].
# The machine's own python3 must have PyTorch for CUDA, Triton, NumPy, safetensors, pytest, pytest-timeout, hypothesis,
# CMake, ninja, scikit-build-core and nanobind; wheels of what is missing are found in .whl/ (docs/gpu.md). What is
# written lies under $OUT, else under benchmarks/results. Where make can fetch packages, `make test-gpu` and `make
# bench-gpu` do the same.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
site=${BISE_SITE:-/tmp/bise-site}
pip="python3 -m pip install -q --no-index --no-deps --no-cache-dir --target $site"
if [ ! -e "$site/.made" ]; then
    for wheel in .whl/*.whl; do
        [ -e "$wheel" ] && $pip "$wheel"
    done
    $pip --no-build-isolation .
    touch "$site/.made"
fi
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
mode=$1
shift
# Kernels take longer to compile than to run: by as many processes as there are cores, where pytest can.
many=$(python3 -c 'import os, xdist; print("-n", min(os.cpu_count(), 12))' 2>/dev/null || true)
# Other versions of packages may warn of what does not matter here; a test may wait for dozens of kernels.
pytest="python3 -m pytest -q -W default -p no:cacheprovider --timeout 500"
case $mode in
kernels) # ends with the table of errors, whose kernels are compiled by then, also where a test failed
    status=0
    $pytest $many -m "not slow" "$@" tests/kernels/triton tests/equivalence/test_triton_logits.py ||
        status=$?
    $pytest -s tests/kernels/triton/test_triton_table.py | tee "$out/gpu-errors.txt"
    exit "$status"
    ;;
identities)
    $pytest $many -m "not slow" -k triton "$@" tests/equivalence/test_identities.py \
        tests/equivalence/test_matrix.py
    ;;
bench) python3 benchmarks/gpu.py --out "$out/gpu.json" "$@" ;;
*)
    echo "usage: gpu_bare.sh kernels|identities|bench [arguments of pytest or of gpu.py]" >&2
    exit 2
    ;;
esac
