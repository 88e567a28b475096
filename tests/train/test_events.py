"""The diary of a run: what a kill or a loss of it leaves."""

import json

import pytest

from bise.train import events
from bise.train.events import RunLog


def diary(path, steps):
    log = RunLog(path, lambda event: None)
    for step in range(1, steps + 1):
        log({"event": "step", "step": step, "loss": 1.0 / step, "lr": 0.1, "tokens": 4})
    return log


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_kill_while_steps_are_forgotten_loses_none_that_is_kept(tmp_path, monkeypatch, place):
    path = tmp_path / "events.jsonl"
    log = diary(path, 5)

    def killed(*_):
        raise KeyboardInterrupt

    if place == "fsync":
        monkeypatch.setattr(events.os, "fsync", killed)
    else:
        monkeypatch.setattr(events.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.forget_after(3)
    monkeypatch.undo()
    again = RunLog(path, lambda event: None)
    assert again.last_loss == pytest.approx(sum(1.0 / step for step in range(1, 6)) / 5)
    again.forget_after(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_diary_that_was_lost_costs_no_result(tmp_path):
    log = RunLog(tmp_path / "events.jsonl", lambda event: None)
    assert log.last_loss is None
    assert log.table().splitlines() == ["step,train_loss,valid_loss,learning_rate,tokens"]
    assert "<svg" in log.curve("a run")
