"""A fuzz of the whole API: no 5xx for a client's mistake, no dropped connection, the same server after it."""

from __future__ import annotations

import http_fuzz
import pytest


def failures(live, cases) -> list[str]:
    live.engine.text = "ok"
    before = http_fuzz.baseline(live.port, "stub")
    wrong = [f"{case.name}: {found}" for case in cases if (found := http_fuzz.outcome(live.port, case, 5.0))]
    assert http_fuzz.baseline(live.port, "stub") == before
    assert live.engine.running == 0
    assert live.fleet.leases == 0
    return wrong


def test_every_fifth_bad_case_is_refused_and_the_server_lives_on(live):
    cases = http_fuzz.all_cases("stub")
    assert len(cases) >= 700
    assert failures(live, cases[::5]) == []


def test_random_changes_to_good_bodies_never_break_the_server(live):
    assert failures(live, http_fuzz.mutations("stub", 150, seed=7)) == []


def test_the_fuzz_notices_a_server_error(live, monkeypatch):
    from bise.server import chat

    def broken(*_: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(chat, "prepared", broken)
    body = b'{"model":"stub","messages":[{"role":"user","content":"Hi"}]}'
    case = http_fuzz.Case("broken", http_fuzz.post("/v1/chat/completions", body))
    assert "server error 500" in http_fuzz.outcome(live.port, case, 5.0)


@pytest.mark.slow
def test_every_bad_case_is_refused(live):
    assert failures(live, http_fuzz.all_cases("stub")) == []


@pytest.mark.slow
def test_10000_random_changes_never_break_the_server(live):
    assert failures(live, http_fuzz.mutations("stub", 10_000, seed=1)) == []
