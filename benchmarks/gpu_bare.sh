#!/bin/sh
# Tests or measures the GPU backend where nothing can be fetched: gpu_bare.sh tests|bench [arguments of gpu.py]
# The machine's own python3 must have PyTorch for CUDA, Triton, NumPy, safetensors, pytest, hypothesis, CMake, ninja,
# scikit-build-core and nanobind; wheels of what is missing are found in .whl/ (docs/gpu.md). Where make can
# fetch packages, `make test-gpu` and `make bench-gpu` do the same.
set -eu
cd "$(dirname "$0")/.."
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
case $mode in
tests)
    python3 -m pytest -q -s -p no:cacheprovider -m "not slow" tests/kernels/triton tests/equivalence/test_triton_logits.py
    python3 -m pytest -q -p no:cacheprovider -m "not slow" -k triton tests/equivalence/test_identities.py \
        tests/equivalence/test_matrix.py
    ;;
bench) python3 benchmarks/gpu.py --out "${OUT:-benchmarks/results}/gpu.json" "$@" ;;
*)
    echo "usage: gpu_bare.sh tests|bench" >&2
    exit 2
    ;;
esac
