"""Guardrails read answers with what they continue; answers without a limit get what their key has left."""

from __future__ import annotations

import contextlib
import threading

import pytest

from bise.store.database import DatabaseDownError
from bise.store.keys import KeyLimits
from bise.store.ledger import LedgerRow
from bise.store.limits import Reservation
from bise.store.rules import Guard, Rule

HELLO = Rule(name="greeting", pattern="Hello", stage="output")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "Hel", "prefix": True},
                ]
            },
        ),
        ("/v1/completions", {"prompt": "Hel", "max_tokens": 9}),
        ("/v1/completions", {"prompt": ["other", "Hel"], "max_tokens": 9}),
        ("/v1/fim/completions", {"prompt": "He", "suffix": "o"}),
    ],
)
def test_a_match_across_what_is_continued_and_the_answer_is_refused(path, body, stream, site):
    _, key = site.key(rules=[HELLO])
    site.engine.text = "ll" if "suffix" in body else "lo"
    response = site.post(path, key, json={"model": "stub", "stream": stream, **body})
    assert "greeting" in response.text
    assert '"content":"lo' not in response.text
    assert site.store.ledger.rows()[0].rule == "greeting"


def test_what_the_prompt_alone_breaks_is_not_the_answers_doing(site):
    _, key = site.key(rules=[HELLO])
    site.engine.text = " and bye"
    body = {"model": "stub", "prompt": "Hello", "max_tokens": 20}
    assert site.post("/v1/completions", key, json=body).status_code == 200


def test_a_word_spelled_with_escapes_is_the_same_word(site):
    _, key = site.key(rules=[HELLO])
    site.engine.text = r'{"a": "H\u0065llo"}'
    assert site.chat(key).status_code == 400


@pytest.mark.parametrize(
    ("before", "text", "after", "broken"),
    [("a", "b", "c", True), ("ab", "c", "", True), ("abc", "d", "", False), ("x", "y", "abc", False),
     ("abc", "abc", "", True), ("", "", "", False)],
)  # fmt: skip
def test_only_matches_that_the_text_has_part_in_count(before, text, after, broken):
    guard = Guard([Rule(name="r", pattern="abc", stage="both")])
    assert (guard.broken_between(before, text, after) == "r") is broken


@pytest.mark.parametrize("name", ["tokens_per_minute", "tokens_per_day"])
def test_an_answer_without_a_limit_gets_what_is_left_and_ends_with_length(name, site):
    site.engine.text = "abcdefghij"
    prompt = site.chat().json()["usage"]["prompt_tokens"]
    _, key = site.key(limits=KeyLimits(**{name: prompt + 4}))
    answer = site.chat(key).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4
    assert site.chat(key).status_code == 429


def test_an_answer_with_a_limit_is_let_in_whole_or_refused(site):
    prompt = site.chat().json()["usage"]["prompt_tokens"]
    _, key = site.key(limits=KeyLimits(tokens_per_day=prompt + 4))
    assert site.chat(key, max_tokens=5).status_code == 429
    assert site.chat(key, max_tokens=4).status_code == 200


def test_whoever_lacks_a_key_on_this_machine_is_told_the_ways_in(site):
    info, _ = site.key()
    site.store.keys.revoke(info.id)
    refused = site.get("/v1/models")
    assert refused.status_code == 401
    assert "bise keys create" in refused.text
    assert "--no-key" in refused.text


def test_limits_of_a_key_change_from_its_next_request_on(site):
    _, root = site.key("root", scopes=["admin"])
    info, key = site.key("ann")
    path = f"/v1/admin/keys/{info.id}"
    changed = site.request("PATCH", path, root, json={"limits": {"requests_per_minute": 0, "priority": 3}})
    assert changed.json()["limits"] == {"requests_per_minute": 0, "priority": 3}
    assert site.chat(key).status_code == 429
    site.request("PATCH", path, root, json={"limits": {"requests_per_minute": None}})
    assert site.chat(key).status_code == 200
    assert site.request("PATCH", path, key, json={"limits": {}}).status_code == 403


def test_a_row_that_can_never_be_written_keeps_no_other_one_from_being_written(site, monkeypatch):
    """Both end while the database is down; what comes back is a backup from before the first key."""
    with monkeypatch.context() as patch:
        broken = DatabaseDownError(OSError("no disk"))
        patch.setattr(site.gate, "_write", lambda entry: (_ for _ in ()).throw(broken))
        for key_id in ("key_lost", None):
            place = key_id and Reservation(id="r", key_id=key_id, requests=None, tokens=None)
            row = LedgerRow(request_id="r", key_id=key_id, owner="o", endpoint="/", model="m")
            site.gate.record(row, place, site.gate.begin_share())
    assert site.gate.write_late() == 0
    assert [row.key_id for row in site.store.ledger.rows()] == [None]


def test_a_request_and_its_repetition_that_end_at_the_same_moment_are_one_row(site, monkeypatch):
    info, _ = site.key()
    both = threading.Barrier(2, timeout=0.3)
    look = site.store.ledger._is_repeated

    def look_together(*rest):
        found = look(*rest)
        with contextlib.suppress(
            threading.BrokenBarrierError
        ):  # the second waits for the first, as it should
            both.wait()
        return found

    monkeypatch.setattr(site.store.ledger, "_is_repeated", look_together)
    row = LedgerRow(
        request_id="r", key_id=info.id, owner=info.owner, endpoint="/", model="m", idempotency_key="same"
    )
    places = [site.store.limits.reserve(info) for _ in range(2)]
    ends = [
        threading.Thread(target=site.gate.record, args=(row, place, site.gate.begin_share()))
        for place in places
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    assert len(site.store.ledger.rows()) == 1
    assert site.store.limits.used(info)["concurrency"] == 0
