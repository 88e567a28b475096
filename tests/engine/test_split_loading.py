"""What a matrix takes of a device while it is brought there, measured, against what is planned for it."""

import json

import numpy as np
import pytest

from bise.engine.split import Sizes, copies_in_loading
from bise.kernels.cpu import arena, packed_size
from bise.kernels.panels import device_parts
from bise.model.pack import Slot

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.profiler import ProfilerActivity, profile  # noqa: E402

from bise.engine.device import _from_panels, _from_rows  # noqa: E402
from bise.engine.placement import Placement  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402
from bise.plan import known_shape  # noqa: E402

ROWS, COLUMNS = 16384, 256
"""Rows enough that those which are put in their new order at once are a small part."""


def copies_measured(run, sent, own, tmp_path):
    """Return the most bytes that the device has at once over those of a matrix; it is RAM here, so that what
    is sent is there already.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    assert kept.size_bytes == own
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("name") == "[memory]"]
    now = most = sent
    for event in sorted(events, key=lambda each: each["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert most > own
    return most / own


@pytest.mark.parametrize("packed_format", ["z4", "q4_1", "q4k", "q6k", "q8", "f16", "bf16"])
def test_panels_take_no_more_of_a_device_in_loading_than_is_planned(packed_format, tmp_path):
    ops = TritonOps(torch.bfloat16, "cpu")
    panels = arena(packed_size(packed_format, ROWS, COLUMNS))
    panels.fill(0)
    slot = Slot("w", (ROWS, COLUMNS), packed_format, 0, len(panels))
    own = sum(device_parts(packed_format, ROWS, COLUMNS, float_bytes=2, is_tiled=True))
    found = copies_measured(lambda: _from_panels(ops, slot, panels), len(panels), own, tmp_path)
    assert found <= copies_in_loading(packed_format, is_kept=packed_format in ("f32", "bf16")) + 0.05


@pytest.mark.parametrize(
    ("stored", "packed_format"), [("bf16", "bf16"), ("f32", "bf16"), ("f32", "f32"), ("f16", "f16")]
)
def test_rows_take_no_more_of_a_device_in_loading_than_is_planned(stored, packed_format, tmp_path):
    ops = TritonOps(torch.bfloat16, "cpu")
    rows = np.zeros((ROWS, COLUMNS * (4 if stored == "f32" else 2)), np.uint8)
    slot = Slot("w", (ROWS, COLUMNS), packed_format, 0, rows.nbytes)
    own = sum(device_parts(packed_format, ROWS, COLUMNS, float_bytes=2, is_tiled=True))
    found = copies_measured(lambda: _from_rows(ops, None, slot, stored, rows), rows.nbytes, own, tmp_path)
    is_kept = stored == packed_format and packed_format in ("f32", "bf16")
    assert found <= copies_in_loading(packed_format, is_kept=is_kept) + 0.05


def test_the_tables_of_angles_of_a_long_context_are_planned():
    sizes = Sizes(known_shape("mistral-nemo"), "q4", Placement("cuda", memory=1 << 40), "q8")
    ops = TritonOps(torch.bfloat16, "cpu")
    few, many = 1000, 5000
    before, after = (
        sum(table.nbytes for table in ops.rope(np.ones(64), np.array([count - 1], np.int32), 1.0))
        for count in (few, many)
    )
    config = sizes.config
    assert config.head_dim == 128
    splits = 2 * (-(-many // 512) - -(-few // 512)) * config.q_dim * 4
    more = sizes.device_scratch(1, many, 1) - sizes.device_scratch(1, few, 1)
    assert more >= after - before
    assert more <= after - before + splits
