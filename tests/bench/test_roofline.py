from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest

from bise.bench.roofline import TimedOps, draw_roofline, op_rows, op_table, op_work
from bise.config import ModelConfig
from bise.engine.memory import packed_formats
from bise.plan import MachineLimits, decode_work, prefill_work, shape_source

CONFIG = ModelConfig(
    family="mistral", dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=512,
    vocab_size=512, max_context=4096,
)  # fmt: skip
LIMITS = MachineLimits(read_bytes_s=10e9, int8_ops_s=100e9, float_ops_s=50e9)


def formats_of(config):
    return packed_formats(shape_source("x", config), "q8")


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2)])
def test_the_ops_of_a_step_add_up_to_its_work(config):
    formats = formats_of(config)
    ops = op_work(config, formats, "f16", rows=1, depth=99)
    whole = decode_work(config, formats, "f16", batch=1, context=100)
    assert sum(size for size, _ in ops.values()) == pytest.approx(whole.bytes_read, rel=1e-9)
    linear = sum(count for op, (_, count) in ops.items() if op != "attend")
    assert linear == pytest.approx(whole.operations, rel=1e-9)
    ops = op_work(config, formats, "f16", rows=64, depth=0)
    linear = sum(count for op, (_, count) in ops.items() if op != "attend")
    assert linear == pytest.approx(prefill_work(config, formats, prompt=64).operations, rel=1e-9)


def test_attention_counts_the_keys_that_each_row_sees():
    windowed = dataclasses.replace(CONFIG, windows=(2, 2))
    full = op_work(CONFIG, formats_of(CONFIG), "f16", rows=4, depth=0)["attend"][1]
    bounded = op_work(windowed, formats_of(windowed), "f16", rows=4, depth=0)["attend"][1]
    assert full == 2 * 4 * 256 * (1 + 2 + 3 + 4)
    assert bounded == 2 * 4 * 256 * (1 + 2 + 2 + 2)


def test_each_op_is_held_against_the_roof_above_it():
    work = {"linear": (1e9, 1e9), "attend": (1e3, 25e9)}
    rows = op_rows({"linear": 0.2, "attend": 1.0, "rope": 0.1}, work, LIMITS, "decode")
    assert [row["op"] for row in rows] == ["attend", "linear", "rope"]
    assert rows[0]["share_of_limit"] == pytest.approx(0.5)  # half of the float rate
    assert rows[1]["share_of_limit"] == pytest.approx(0.5)  # half of the read rate
    assert rows[2]["share_of_limit"] is None
    columns, cells = op_table(rows)
    assert all(len(row) == len(columns) for row in cells)


def test_timed_ops_note_each_call_and_return_its_result():
    class Inner:
        name = "inner"

        def moe(self, x):
            return x + 1

    timed = TimedOps(Inner())
    assert timed.name == "inner"
    assert timed.moe(1) == 2
    assert set(timed.seconds) == {"mlp"}


def test_the_picture_is_well_formed_and_has_a_point_per_op_with_work():
    work = {"linear": (1e9, 1e9), "attend": (1e3, 25e9)}
    rows = op_rows({"linear": 0.2, "attend": 1.0, "rope": 0.1}, work, LIMITS, "decode")
    drawn = ElementTree.fromstring(draw_roofline(rows, LIMITS, "a <model>"))
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 2
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
