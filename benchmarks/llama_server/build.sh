#!/bin/sh
# Build llama-server for benchmarks/serving.py into ~/.cache/bise/llama-server (ten minutes on two cores).
#
#   sh benchmarks/llama_server/build.sh [PYTHON]
#
# The source comes from the sdist of the llama-cpp-python that PYTHON has installed, through pip; its libraries
# are used as they are, so both measure the same llama.cpp. Needs cmake, ninja, a C++17 compiler.
set -eu
python=${1:-python}
here=$(cd "$(dirname "$0")" && pwd)
target=$HOME/.cache/bise/llama-server
version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
libraries=$("$python" -c 'from importlib.util import find_spec; print(find_spec("llama_cpp").submodule_search_locations[0])')/lib
mkdir -p "$target/source"
"$python" -m pip download -q --no-deps --no-binary llama-cpp-python -d "$target/source" "llama-cpp-python==$version"
tar xzf "$target/source/llama_cpp_python-$version.tar.gz" -C "$target/source"
cmake -G Ninja -S "$here" -B "$target/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_RPATH="$libraries" \
  -DSOURCE="$target/source/llama_cpp_python-$version/vendor/llama.cpp" -DLIBRARIES="$libraries"
ninja -C "$target/build" llama-server
cp "$target/build/tools/server/llama-server" "$target/llama-server"
