from __future__ import annotations

import json

import pytest

from bise.plan import MachineLimits

LIMITS = MachineLimits(read_bytes_s=34e9, int8_ops_s=930e9, float_ops_s=220e9)


@pytest.fixture
def plan(cli, monkeypatch):
    """Run `bise plan` on a machine of known limits."""
    monkeypatch.setattr("bise.bench.limits.measure_limits", lambda threads: LIMITS)
    return lambda *args: cli("plan", *args)


def test_a_plan_of_a_known_model_needs_none_of_its_files(plan):
    result = plan("mistral-7b", "--quant", "q4", "--context", "4096", "--memory", "16GiB", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["fits"] is True
    assert told["on_this_machine"] is False
    assert told["bytes"]["total"] == pytest.approx(4.55 * 2**30, rel=0.02)
    assert told["decode_tokens_per_s"] == pytest.approx(7.4, abs=0.1)
    assert told["best_quant"] == "bf16"
    assert set(told["bytes"]) == {"weights", "kv", "scratch", "loading", "process", "adapters", "total"}


def test_a_plan_for_people_gives_a_verdict_and_a_way_out(plan):
    result = plan("mixtral-8x7b", "--quant", "q8", "--context", "4096", "--memory", "30GB")
    assert result.code == 0
    lines = dict(line.split(None, 1) for line in result.out.splitlines())
    assert lines["verdict"].startswith("does not fit in 27.94 GiB: ")
    assert lines["widest"] == "q4"
    assert lines["longest"] == "none fits per sequence"


def test_without_a_model_of_that_name_the_aliases_are_told(plan):
    result = plan("mistral-7c")
    assert result.code == 2
    assert "did you mean mistral-7b?" in result.err


@pytest.mark.parametrize("size", ["16GiBs", "-3", "0", "lots", "1e99GiB"])
def test_an_amount_of_memory_that_is_none_is_a_mistake(plan, size):
    result = plan("s06", f"--memory={size}")
    assert result.code == 2
    assert "is not an amount of memory such as 16GiB" in result.err


@pytest.mark.parametrize(
    ("size", "expected"), [("16GiB", 16 << 30), ("8G", 8 * 10**9), ("512 mib", 512 << 20), ("1000000", 10**6)]
)
def test_amounts_of_memory_are_read_in_both_kinds_of_units(plan, size, expected):
    result = plan("s06", "--context", "64", "--memory", size, "--json")
    assert json.loads(result.out)["memory_bytes"] == expected
