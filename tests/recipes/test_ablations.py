"""The ablations on made-up rows: equal compute, resumption, a report of what is there."""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("torch")

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "ablations"), str(RECIPES / "brise"), str(RECIPES)]

import ablate  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import train as recipe_train  # noqa: E402
from ablate import SIZES, Size, flops_per_token, planned_steps, result_of, trained, variants  # noqa: E402
from report import interval, row_of, write_report  # noqa: E402

TINY = Size(32, 2, 8, 4, 32, 2, 3)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    torch.set_num_threads(1)  # tiny products: threads only get in the way of the tests beside this one
    monkeypatch.setattr(ablate, "LONG_ROWS", 1)
    monkeypatch.setattr(ablate, "LONG_TOKENS", 1024)
    for name in ("VALID_ROWS", "CHAT_ROWS", "ROUTED_ROWS"):
        monkeypatch.setattr(ablate, name, 4)
    monkeypatch.setattr(recipe_train, "REPORT_STEPS", 1)
    values = np.random.default_rng(5)
    for name, rows, width in (("pretrain", 16, 513), ("valid_text", 128, 513), ("valid_chat", 80, 600)):
        ids = values.integers(20, 4096, (rows, width)).astype(np.uint16)
        ids[1:, 0] = ids[:-1, -1]
        np.save(tmp_path / f"{name}.ids.npy", ids)
        np.save(tmp_path / f"{name}.learned.npy", np.ones((rows, width), np.bool_))
    return argparse.Namespace(run=tmp_path, work=tmp_path, size="tiny", threads=1)


@pytest.mark.parametrize("name", list(SIZES))
def test_every_variant_gets_the_compute_of_the_base(name: str) -> None:
    size = SIZES[name]
    base = flops_per_token(variants(size)["gqa"]) * size.steps
    for variant, config in variants(size).items():
        given = flops_per_token(config) * planned_steps(config, size)
        assert given == pytest.approx(base, rel=0.6 / planned_steps(config, size)), variant


def test_the_compared_models_are_as_large_as_the_questions_say() -> None:
    models = variants(SIZES["small"])
    base, sparse, dense = (models[name] for name in ("gqa", "moe", "dense-total"))
    routers = sparse.num_layers * sparse.dim * sparse.num_experts
    assert sparse.num_active_params - routers == base.num_params
    assert sparse.num_params - routers == dense.num_params
    assert [models[name].num_kv_heads for name in ("mha", "gqa", "mqa")] == [8, 2, 1]


def test_a_run_is_reported_whole(options: argparse.Namespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("gqa", "moe"):
        result = result_of(name, variants(TINY)[name], TINY, options, 0)
        (out / f"{name}.0.json").write_text(json.dumps(result))
        assert 8 < result["text_loss"] < 9
        assert [len(row) for row in result["by_position"]] == [16]
    shares = result["expert_use"]["prose"]
    assert [len(layer) for layer in shares] == [8, 8]
    assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in shares)
    write_report(out)
    text = (out / "report.md").read_text()
    assert "| moe | 1 |" in text
    assert "one seed" in text
    for picture in out.glob("*.svg"):
        ET.fromstring(picture.read_text())
    drawn = {path.stem for path in out.glob("*.svg")}
    assert drawn == {"kv", "position", "experts", "differences"}


def test_a_stopped_run_goes_on_and_ends_the_same(options: argparse.Namespace, tmp_path: Path) -> None:
    config = variants(TINY)["window"]
    whole, _ = trained("window", config, TINY, options, 1)
    assert whole.progress.is_finished
    again, seconds = trained("window", config, TINY, options, 1)
    assert seconds is None, "nothing was left to do"
    for name, weight in whole.weights.items():
        assert (weight == again.weights[name]).all(), name


def test_differences_are_taken_seed_by_seed() -> None:
    def result(seed: int, text: float) -> dict[str, object]:
        numbers = dict.fromkeys(
            ("steps", "tokens", "flops", "parameters", "active_parameters", "kv_bytes_per_token"), 1
        )
        losses = {"text_loss": text, "chat_loss": 1.0, "train_loss": 1.0}
        rows = {"text_rows": [text - 0.5, text, text + 0.5 + seed]}
        return {"seed": seed, **numbers, "kv_bytes_at_4096": 1, "core_seconds_a_step": None, **losses, **rows}

    base = [result(0, 5.0), result(1, 6.0)]
    row = row_of(base, [result(1, 5.5), result(0, 4.52)])
    assert row["text_loss_difference"] == pytest.approx(-0.49)
    # Two values 0.02 apart: 12.706 * (0.02 / sqrt(2)) / sqrt(2).
    assert row["text_loss_difference_interval"] == pytest.approx(0.12706)
    assert row["text_by_rows"] == pytest.approx(0), "rows differ among themselves, and alike for both"
    assert row["text_loss_decided"]
    assert not row_of(base, [result(1, 5.5), result(0, 4.6)])["text_loss_decided"]
    assert not row["chat_loss_decided"]
    assert not row_of(base, [result(0, 4.0)])["text_loss_decided"], "one seed decides nothing"


def test_an_interval_holds_the_true_mean_nineteen_times_of_twenty() -> None:
    draws = np.random.default_rng(0).standard_normal((4000, 3))
    held = [abs(mean) <= half for mean, half in map(interval, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)
    assert interval([2.0]) == (2.0, None)
