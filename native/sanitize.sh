#!/bin/sh
# Builds the native tests with AddressSanitizer and UndefinedBehaviorSanitizer (then ThreadSanitizer) and runs them.
# Needs g++ or clang++ with their sanitizer runtimes; cmake and ninja come from PATH or the project's venv.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
command -v cmake >/dev/null || .venv/bin/python -m pip install --quiet --disable-pip-version-check cmake
for kind in address,undefined thread; do
  build="build/sanitize-$kind"
  cmake -S native -B "$build" -DBISE_NATIVE_TESTS=ON -DBISE_SANITIZE="$kind" -DCMAKE_BUILD_TYPE=None >/dev/null
  cmake --build "$build" -j 2 >/dev/null
  echo "sanitizer: $kind"
  "$build/native_test"
done
