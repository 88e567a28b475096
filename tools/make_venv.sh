#!/bin/sh
# Makes .venv in the repository and installs bise into it: make_venv.sh run|dev
# Quiet unless something is wrong; then it says what to install. Full output goes to .venv/install.log.
set -eu
mode=$1
venv=.venv
say() { echo "bise: $*" >&2; }
die() { say "$*"; exit 2; }

find_python() {
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    seen=$(python3 -V 2>&1 || true)
    die "needs Python 3.11 or newer (found: ${seen:-none}); install it: apt-get install python3 python3-venv python3-dev"
}

check_tools() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$1 has no venv module; install it: apt-get install python3-venv"
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        die "the headers of $1 are missing; install them: apt-get install python3-dev"
    for compiler in ${CXX:-} c++ g++ clang++; do
        if command -v "$compiler" >/dev/null 2>&1; then return; fi
    done
    die "needs a C++20 compiler; install one: apt-get install g++"
}

if [ ! -x $venv/bin/python ]; then
    python=$(find_python)
    check_tools "$python"
    "$python" -m venv $venv </dev/null || die "could not make $venv with $python"
else
    check_tools $venv/bin/python
fi

case $mode in
run) set -- . ; note="bise" ;;
dev) set -- -e '.[dev]' ; note="bise and the development tools" ;;
*) die "usage: make_venv.sh run|dev" ;;
esac
say "installing $note into $venv (a few minutes the first time; log: $venv/install.log)"
if ! $venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
    </dev/null >$venv/install.log 2>&1; then
    tail -n 25 $venv/install.log >&2
    die "installation failed; the whole log is in $venv/install.log"
fi
touch "$venv/.$mode"
