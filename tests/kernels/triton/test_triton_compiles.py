"""Machine code of every kernel, made on a machine without a GPU."""

import os
import re
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


def narrow_loads(lines):
    """Return the products of few rows that never read 16 bytes of memory at once."""
    few = ("qkv", "gate", "add", "expert mix", "few")
    products = [line for line in lines if "matmul" in line and any(name in line for name in few)]
    return [line for line in products if "16 bytes a load" not in line]


def test_one_kernel_of_each_kind_compiles_for_hopper_and_reads_16_bytes_at_once(tmp_path):
    lines = compile_kernels(tmp_path)
    assert len(lines) == 3
    assert not narrow_loads(lines)
    assert not too_large(lines)
    assert not spilled(lines)


SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}
"""Bytes that a program may keep on chip: of data-centre cards and of consumers' (8.6 has 99 KiB, too)."""


def too_large(lines):
    """Return the kernels that would not start for want of memory on chip."""
    found = [re.fullmatch(r"(sm_\d+) (.*): \d+ bytes, (\d+) shared, .*", line) for line in lines]
    return [each[0] for each in found if int(each[3]) > SHARED[each[1]]]


def spilled(lines):
    """Return the kernels whose loop over columns has more values than registers, by more than a few; those in
    float32, which do without tensor cores, are left out.
    """
    narrow = [line for line in lines if not any(wide in line for wide in ("f32", "adapter", "route"))]
    return [line for line in narrow if int(line.split()[-2]) > 4]


@pytest.mark.slow
def test_every_kernel_and_format_compiles_for_ampere_ada_hopper_and_blackwell(tmp_path):
    lines = compile_kernels(tmp_path, "all")
    assert len(lines) == 4 * 54 + 2
    assert not narrow_loads(lines)
    assert not too_large(lines)
    assert not spilled(lines)
