"""What `bise tune check` says of time and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bise.text.turns import LearnedText
from bise.train import timing
from bise.train.data import DataFile, Example
from bise.train.estimate import Plan, data_report, memory_bytes

PLAN = Plan(max_tokens=64)


def file_of(lengths: list[int]) -> DataFile:
    examples = tuple(
        Example(n, "chat", (LearnedText((5,) * length, (False,) * 2 + (True,) * (length - 2)),))
        for n, length in enumerate(lengths, 1)
    )
    return DataFile(path=Path("data.jsonl"), sha256="", examples=examples, bad=(), duplicates=())


def config():
    import tiny_model

    return tiny_model.CONFIG


def test_the_time_is_that_of_a_timed_step_for_every_token_of_every_pass():
    asked = []

    def timer(model, lengths, learned, is_full):
        asked.append((list(lengths), learned, is_full))
        return 0.5

    report = data_report(file_of([10, 20, 30, 100]), config(), replace(PLAN, epochs=4, batch=2), timer)
    assert asked == [([20, 64], pytest.approx(152 / 160), False)]  # cut to 64 tokens; one short, one long
    assert report["seconds"] == pytest.approx(0.5 / 84 * (10 + 20 + 30 + 64) * 4)
    assert report["is_timed"]
    held_back = data_report(file_of([20] * 10), config(), replace(PLAN, epochs=1), timer)["seconds"]
    assert held_back == pytest.approx(0.5 / 160 * 200 * (1 + 11 * 0.1 / 3))


def test_without_a_timer_the_time_is_a_guess_and_says_so():
    report = data_report(file_of([10, 20]), config(), PLAN)
    assert not report["is_timed"]
    assert report["seconds"] > 0


def test_a_step_is_timed_and_a_long_one_in_part(monkeypatch):
    seconds = timing.step_seconds(config(), [20, 30], 0.5, is_full=False)
    assert 0 < seconds < 60
    timed = []
    monkeypatch.setattr(
        timing, "_pass_seconds",
        lambda model, layers, texts, is_full: timed.append([len(t.ids) for t in texts]) or float(layers),
    )  # fmt: skip
    large = replace(
        config(), dim=4096, hidden_dim=14336, vocab_size=32000, num_layers=32, windows=(None,) * 32
    )
    # 1 s for a layer and 2 s for two: 32 s for 32 layers, of as many tokens as were timed.
    most = timing.step_seconds(large, [1000] * 8, 0.5, is_full=False)
    tokens = sum(timed[0])
    assert tokens < 1000
    assert most == pytest.approx(32 * 8000 / tokens)


def test_memory_grows_with_what_is_trained_and_with_the_longest_step():
    lengths = [10] * 20 + [60]
    lora, full = (memory_bytes(config(), lengths, replace(PLAN, method=name)) for name in ("lora", "full"))
    assert full > lora
    assert memory_bytes(config(), [60] * 21, PLAN) > lora > memory_bytes(config(), [10] * 21, PLAN)
