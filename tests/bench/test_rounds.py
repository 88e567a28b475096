from __future__ import annotations

import itertools

import pytest

from bise.bench.rounds import Case, Meters, PeerError, Series, Turn, run_rounds, wait_until_idle

PREFILL = Case(op="prefill", prompt=100, batch=1, context=0, steps=0)
DECODE = Case(op="decode", prompt=0, batch=4, context=16, steps=10)


class FakeEngine:
    version = "1"

    def __init__(self, name, log, seconds=1.0, fails=None):
        self.name, self.log, self.seconds, self.fails = name, log, seconds, fails
        self.released = 0

    def prepare(self, case, rounds):
        if self.fails:
            raise PeerError(self.fails)

    def run(self):
        self.log.append(self.name)
        return self.seconds

    def release(self):
        self.released += 1

    def cpu_seconds(self):
        return 0.0


def meters(busy=0.0, rates=(30e9,)):
    """A clock that moves by one second per reading, others' work by `busy` cores."""
    clock = itertools.count()
    work = itertools.count()
    rate = itertools.cycle(rates)
    return Meters(
        read_rate=lambda: next(rate),
        busy_seconds=lambda: next(work) * busy,
        joules=lambda: None,
        clock=lambda: float(next(clock)),
        own_seconds=lambda: 0.0,
    )


def turn(**changes) -> Turn:
    fields = {"seconds": 1.0, "read_before": 30e9, "read_after": 30e9, "foreign_cores": 0.0, "joules": None}
    return Turn(**(fields | changes))


def test_engines_take_turns_and_the_first_one_changes_every_round():
    log = []
    run_rounds(PREFILL, [FakeEngine("a", log), FakeEngine("b", log)], 3, meters())
    assert log == ["a", "b", "a", "b", "b", "a", "a", "b"]  # a warm-up each, then three rounds


def test_an_engine_that_cannot_run_is_told_and_the_others_go_on():
    log = []
    series, skipped = run_rounds(
        DECODE, [FakeEngine("a", log), FakeEngine("b", log, fails="too long")], 2, meters()
    )
    assert [entry.contestant for entry in series] == ["a"]
    assert len(series[0].turns) == 2
    assert skipped == ["b skipped for decode of 4 at 16: too long"]


def test_everything_prepared_is_released_also_when_a_turn_fails():
    log = []
    good, bad = FakeEngine("a", log), FakeEngine("b", log)
    bad.run = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_rounds(PREFILL, [good, bad], 1, meters())
    assert (good.released, bad.released) == (1, 1)


def test_no_round_starts_after_the_budget_but_one_always_does():
    log = []
    series, _ = run_rounds(
        PREFILL, [FakeEngine("a", log, seconds=9.0)], 5, meters(), warm_up=False, budget_s=10.0
    )
    assert len(series[0].turns) == 2
    series, _ = run_rounds(PREFILL, [FakeEngine("a", log)], 5, meters(), warm_up=False, budget_s=0.5)
    assert len(series[0].turns) == 1


def test_work_of_others_marks_a_round():
    quiet, _ = run_rounds(PREFILL, [FakeEngine("a", [])], 1, meters(busy=0.06))
    loud, _ = run_rounds(PREFILL, [FakeEngine("a", [])], 1, meters(busy=0.5))
    assert quiet[0].turns[0].foreign_cores == pytest.approx(0.04)  # two clock ticks are forgiven
    assert quiet[0].turns[0].is_clean
    assert not loud[0].turns[0].is_clean


def test_read_rates_that_differ_by_more_than_15_per_cent_mark_a_round():
    assert turn(read_before=30e9, read_after=26e9).is_clean
    assert not turn(read_before=30e9, read_after=25e9).is_clean


def test_the_median_is_taken_over_clean_turns_only():
    series = Series(
        "a", "1", PREFILL, [turn(seconds=1.0), turn(seconds=9.0, foreign_cores=1.0), turn(seconds=2.0)]
    )
    assert series.seconds == 1.5
    assert not series.is_noisy


def test_when_no_turn_is_clean_all_count_and_the_series_says_so():
    series = Series(
        "a", "1", PREFILL, [turn(seconds=1.0, foreign_cores=1.0), turn(seconds=3.0, foreign_cores=1.0)]
    )
    assert series.seconds == 2.0
    assert series.is_noisy


def test_tokens_of_a_turn_are_those_of_every_sequence():
    assert PREFILL.tokens == 100
    assert DECODE.tokens == 40


def test_waiting_ends_at_its_limit_and_tells_how_busy_the_machine_is():
    work = itertools.count()
    assert wait_until_idle(0.0, lambda: next(work) * 10.0) > 1.0
    assert wait_until_idle(0.0, lambda: 5.0) < 0.08
    assert wait_until_idle(0.0, lambda: None) is None
