from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bise.engine.memory import (
    FEW_ROW_BYTES,
    TILE_ROW_BYTES,
    checked_kv_format,
    loading_bytes,
    memory_need,
    planned_context,
    require_weights,
)
from bise.errors import ConfigError, MemoryPlanError
from bise.kernels import BLOCK_SIZE
from bise.model.checkpoint import open_model
from bise.model.pack import SLICE_BYTES, plan_packing
from bise.plan import known_shape

sys.path.insert(0, str(Path(__file__).parent))
from sized_model import Size, write

sys.path.pop(0)

SCRIPT = Path(__file__).parent / "sized_model.py"
TOLERANCE = 0.05

SMALL = Size()
WIDE_VOCABULARY = Size(dim=1024, layers=2, heads=8, hidden=2048, vocab=32000)
DEEP = Size(dim=768, layers=10, heads=12, kv_heads=4, hidden=2048)
MIXTURE = Size(hidden=1024, experts=8)
WINDOWED = Size(layers=6, window=256)

CASES = [
    (size, quant, kv, context, sequences)
    for size, rows in {
        SMALL: [("q4", "f16", 512, 1), ("q8", "q8", 1024, 4), ("none", "f32", 2048, 1),
                ("bf16", "f16", 4096, 1), ("q8", "f32", 4096, 2)],
        WIDE_VOCABULARY: [("q4", "f16", 256, 1), ("q8", "f16", 512, 1), ("bf16", "q8", 128, 1),
                          ("none", "auto", 64, 1)],
        DEEP: [("q4", "f16", 512, 1), ("q8", "f16", 2048, 1), ("bf16", "bf16", 256, 1),
               ("none", "f32", 128, 2), ("q4", "q8", 1024, 2)],
        MIXTURE: [("q4", "f16", 512, 1), ("q8", "f16", 1024, 2), ("bf16", "f16", 256, 1),
                  ("q8", "q8", 64, 4)],
        WINDOWED: [("q8", "f16", 2048, 1), ("q4", "f32", 2048, 4), ("bf16", "q8", 4096, 1)],
    }.items()
    for quant, kv, context, sequences in rows
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sized")


def peak_and_prediction(folder: Path, case) -> tuple[int, int]:
    """The first start of a model is measured: nothing is cached yet, so its weights are converted."""
    size, quant, kv, context, sequences = case
    path = write(folder, size)
    need = memory_need(
        open_model(path), quant, context=context, kv_format=checked_kv_format(kv, quant), sequences=sequences
    )
    command = [sys.executable, str(SCRIPT), str(path), quant, kv, str(context), str(sequences)]
    home = folder / "homes" / "-".join(map(str, case[1:])) / size.name
    environment = os.environ | {"BISE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout), need.total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("case", [CASES[1], CASES[14]], ids=["dense", "mixture"])
def test_the_predicted_peak_is_the_measured_one(folder, case):
    peak, predicted = peak_and_prediction(folder, case)
    assert predicted == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_twenty_one_predictions_are_within_five_per_cent_and_their_median_within_two(folder):
    assert len(CASES) >= 20
    errors = {}
    for case in CASES:
        peak, predicted = peak_and_prediction(folder, case)
        errors[f"{case[0].name} {case[1:]}"] = predicted / peak - 1
        sys.stderr.write(
            f"{case[0].name} {case[1:]}: {peak >> 20} MiB, predicted {predicted / peak - 1:+.1%}\n"
        )
    wrong = {name: round(error, 3) for name, error in errors.items() if abs(error) > TOLERANCE}
    assert not wrong
    assert statistics.median(abs(error) for error in errors.values()) <= 0.02


def test_weights_that_do_not_fit_are_refused_before_anything_is_read():
    source = known_shape("mistral-7b")
    with pytest.raises(
        MemoryPlanError, match=r"mistral-7b needs 4\.\d GiB for its weights, 3\.0 GiB of memory"
    ):
        require_weights(source, "q4", 3 << 30)
    require_weights(source, "q4", 5 << 30)
    with pytest.raises(
        MemoryPlanError, match=r"needs 4\.\d GiB for its weights, 10\.0 MiB of memory are free"
    ):
        require_weights(source, "q4", 10 << 20)


def test_a_context_that_does_not_fit_is_refused_and_a_default_one_shortened():
    source = known_shape("mistral-7b")
    with pytest.raises(MemoryPlanError, match="a context of 32768 tokens needs 4"):
        planned_context(source, "q4", "f16", context=32768, sequences=1, available=2 << 30)
    tokens, notes = planned_context(source, "q4", "f16", context=None, sequences=1, available=2 << 30)
    assert tokens == 4096
    assert notes == ("context 4096 of the model's 32768 tokens; --context N asks for another",)


def test_a_context_beyond_the_models_own_names_the_limit():
    with pytest.raises(ConfigError, match="context must be from 1 to 32768"):
        planned_context(known_shape("mistral-7b"), "q4", "f16", context=40000, sequences=1, available=None)


def test_loading_exceeds_the_weights_by_the_slices_of_the_last_one_less_what_is_not_packed_yet():
    source = known_shape("s06")  # its head, 65.5 M values, is converted last
    step = (SLICE_BYTES // 4) // 2048 // 16 * 16 * 2048
    rest = 32000 * 2048 % step
    stored = 2 * step  # stays with the allocator
    ends = [
        stored + 8 * step - (step + rest) * 8.5 / 8,  # the last whole slice beside the one before it
        stored + 4 * step + 4 * rest - rest * 8.5 / 8,
    ]
    assert loading_bytes(source, "q8") == pytest.approx(max(ends), rel=1e-3)
    assert loading_bytes(source, "none") < loading_bytes(source, "q8")


def test_shapes_in_their_own_order_are_packed_as_a_model_is():
    assert [slot.name for slot in plan_packing(known_shape("s06"), "q8").slots][-1] == "output"


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("formats.h", "kTileRowBytes", TILE_ROW_BYTES),
        ("context.cpp", "kFewBytes", FEW_ROW_BYTES),
        ("ops.h", "kKvBlock", BLOCK_SIZE),
    ],
)
def test_sizes_of_the_native_code_are_known_as_they_are(file, name, value):
    text = (Path(__file__).parents[2] / "native" / file).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^constexpr \w+ {name} = ([0-9 *]+);", text, re.MULTILINE)
    assert math.prod(int(factor) for factor in found.split("*")) == value
