"""The script for a lent machine, where each call costs: what it runs there, without git and npm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_bare.sh"
TOOLS = ("date", "dirname", "mkdir", "sleep", "tee", "timeout", "touch")

PYTHON = """#!/bin/sh
# Stands in for python3: notes what it is asked to do, and does the part of it that matters here.
echo "$BISE_SKIP_WEB|$*" >>"$CALLS"
case "$*" in
*"pip install"*) mkdir -p "$BISE_SITE" ;;
"-c "*) echo "-n 3" ;;
*gpu.py*) trap 'echo interrupted >>"$CALLS"; kill $!; exit 130' INT; sleep "$SECTION_SECONDS" & wait $! ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """Return a function that calls the script: (arguments, seconds that a section takes) to what it ran."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text(PYTHON)
    (tools / "python3").chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, seconds="0", **settings):
        calls.write_text("")
        environment = {
            "PATH": str(tools), "CALLS": str(calls), "BISE_SITE": str(tmp_path / "site"),
            "OUT": str(tmp_path), "SECTION_SECONDS": seconds,
        }  # fmt: skip
        command = [shutil.which("sh"), str(SCRIPT), *arguments]
        done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines()

    return run


@pytest.mark.skipif(os.name != "posix", reason="a script for a shell")
def test_the_first_call_installs_bise_without_its_page_and_later_ones_nothing(call):
    status, first = call("kernels")
    assert status == 0
    assert first[0].startswith("1|-m pip install")
    assert "--no-build-isolation ." in first[0]
    kernels, table = first[2:]
    assert "-n 3 -m not slow tests/kernels/triton" in kernels
    assert "-s tests/kernels/triton/test_triton_table.py" in table
    assert not [line for line in call("identities")[1] if "pip" in line]


@pytest.mark.skipif(os.name != "posix", reason="a script for a shell")
def test_what_takes_too_long_is_interrupted_and_so_can_tell_what_it_found(call):
    assert call("bench", "--toy")[0] == 0
    status, calls = call("bench", "--only", "decode", seconds="60", BISE_SECONDS="1")
    assert status == 124
    assert calls[-1] == "interrupted"
    assert "--only decode" in calls[-2]
