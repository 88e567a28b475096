"""Machine code of every kernel, made on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


def compile_kernels(tmp_path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nothing that an earlier run compiled
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_every_kernel_compiles_for_hopper(tmp_path):
    assert len(compile_kernels(tmp_path)) == 14


@pytest.mark.slow
def test_every_format_compiles_for_ampere_hopper_and_blackwell(tmp_path):
    assert len(compile_kernels(tmp_path, "all")) == 3 * 36
