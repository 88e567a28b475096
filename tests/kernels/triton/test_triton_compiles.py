"""Machine code of every kernel, made on a machine without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")


def run_compiler(tmp_path, script, *arguments):
    """Return what a script beside this one prints, which uses the compiler instead of the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nothing that an earlier run compiled
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_kernels(tmp_path, *arguments):
    return run_compiler(tmp_path, "compile_kernels.py", *arguments).splitlines()


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
    columns = columns_at_once(lines)
    assert columns["sm_90 decode q8"] == columns["sm_90 attend q8"]


def columns_at_once(lines):
    """Return by kernel how many neighbouring columns a thread takes into a product: where two kernels differ
    in that, they differ in the last bits.
    """
    found = [re.fullmatch(r"(sm_\d+ .*): .* bytes a load, (\S+) columns, .*", line) for line in lines]
    return {each[1]: each[2] for each in found}


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


@pytest.fixture(scope="module")
def all_kernels(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("all"), "all")


@pytest.mark.slow
@pytest.mark.xfail(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="Triton 3.7 spills in loops over 4-bit codes: many rows on 8.0, sorted ones on 8.9 and 12.0, too",
)
def test_no_card_but_hopper_spills_registers_in_a_loop_either(all_kernels):
    assert not spilled(all_kernels)


@pytest.mark.slow
def test_every_kernel_and_format_compiles_for_ampere_ada_hopper_and_blackwell(all_kernels):
    lines = all_kernels
    assert len(lines) == 4 * 55 + 2
    assert not narrow_loads(lines)
    assert not too_large(lines)
    assert not spilled([line for line in lines if line.startswith("sm_90 ")])
    columns = columns_at_once(lines)
    for architecture in SHARED:
        for kv in ("", " q8"):
            assert columns[f"{architecture} decode{kv}"] == columns[f"{architecture} attend{kv}"]
        for form in ("z4", "q4_1", "q4k", "n4", "n4k", "q8", "q6k", "q2k", "bf16"):
            of_form = {
                each for name, each in columns.items() if name.startswith(f"{architecture} matmul {form} ")
            }
            assert len(of_form - {"-"}) == 1, (architecture, form)


@pytest.mark.slow
def test_products_of_16_bits_go_through_one_instruction_whatever_their_rows_are(all_kernels):
    pattern = r"(sm_\d+) matmul (?!route|adapter|z4 f32)[^:]*: .* columns, (\S+), .*"
    by_card = {}
    for each in filter(None, (re.fullmatch(pattern, line) for line in all_kernels)):
        by_card.setdefault(each[1], set()).add(each[2])
    assert by_card == {card: {"wgmma" if card == "sm_90" else "mma.sync"} for card in SHARED}


def test_a_step_of_another_number_of_rows_needs_no_kernel_of_its_own(tmp_path):
    """A compiler that runs while requests wait is a pause of seconds."""
    new = json.loads(run_compiler(tmp_path, "dry_device.py"))["new"]
    assert new["dense, decoded"]["_decode"] == new["dense, prompts"]["_attend"] == 1
    assert new["other numbers of rows, and sampling"] == {"_sample": 1}


@pytest.mark.slow
def test_every_launch_of_models_compiles_with_what_the_runtime_makes_constants(tmp_path):
    """A number that is 1 comes to a kernel as a constant: the interpreter passes it as any other."""
    assert json.loads(run_compiler(tmp_path, "dry_device.py", "compile"))["faults"] == []
