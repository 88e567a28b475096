import asyncio
import itertools
import logging
import re
import threading
from decimal import Decimal
from types import SimpleNamespace

import pytest
from sqlalchemy import inspect, text

from bise.errors import ConfigError
from bise.server.access import Access, Caller, check_bind
from bise.store.database import DatabaseDownError
from bise.store.energy import Shares
from bise.store.keys import KeyLimits
from bise.store.prices import HouseRates, Price
from bise.store.rules import Rule

OPEN_ROUTES = {("GET", "/health"), ("GET", "/")}
"""Everything else asks for a key. The page at / is static; what it calls asks."""


def _routes(site):
    """Return (method, path with its parameters filled in) of every route there is."""
    pending = list(site.app.routes)
    while pending:
        route = pending.pop(0)
        if inner := getattr(route, "original_router", None):  # FastAPI keeps included routers as they are
            pending += inner.routes
            continue
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in sorted(route.methods - {"HEAD"}):
            yield method, path


def test_every_route_denies_whoever_has_no_key(make_site):
    site = make_site(access=Access.REQUIRED)
    found = 0
    for method, path in _routes(site):
        response = site.request(method, path)
        if (method, path) in OPEN_ROUTES:
            assert response.status_code != 401, (method, path)
            continue
        found += 1
        assert response.status_code == 401, (method, path, response.text[:200])
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert found > 40


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic Zm9vOmJhcg=="},
        {"authorization": "Bearer bise-wrong"},
        {"authorization": "Bearer " + "x" * 5000},
        {"authorization": "Bearer \xe9\xe9".encode("latin-1")},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"cookie": "key=1"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-original-url": "/health"},
        {"x-http-method-override": "GET"},
        {"bise.caller": "x"},
    ],
)
def test_nothing_but_a_good_key_opens_a_route(site, headers):
    site.key()
    assert site.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1/models/", "/V1/models", "/v1/./models", "/health/../v1/models", "/v1%2fmodels",
     "/health;/v1/models", "/health%00/v1/models", "/health?x=/v1/models"],
)  # fmt: skip
def test_no_way_of_writing_a_path_gets_around_the_key(site, path):
    site.key()
    response = site.get(path)
    assert response.status_code in (401, 404, 400) or path.startswith("/health?")
    assert "stub" not in response.text


def test_both_headers_carry_a_key_and_two_that_differ_are_refused(site):
    _, key = site.key()
    assert site.get("/v1/models", key).status_code == 200
    assert site.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert site.get("/v1/models", key, headers={"x-api-key": key}).status_code == 200
    assert site.get("/v1/models", key, headers={"x-api-key": "other"}).status_code == 401
    assert site.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_this_machine_needs_no_key_until_the_first_one_is_made(site):
    assert site.get("/v1/models").status_code == 200
    assert site.get("/v1/models", "sk-anything").status_code == 200
    assert site.get("/v1/models", "bise-not-a-key-of-ours").status_code == 401
    info, _ = site.key()
    assert site.get("/v1/models").status_code == 401
    site.store.keys.revoke(info.id)
    assert site.get("/v1/models").status_code == 401  # revoking a key must not open the door


def test_a_key_whose_requests_wait_for_the_store_keeps_no_other_key_waiting(site, monkeypatch):
    (large, _), (small, _) = site.key("large"), site.key("small")
    reserve, let_go, waiting = site.store.limits.reserve, threading.Event(), []

    def slowly(key):
        if key.id == large.id:
            waiting.append(key)
            assert let_go.wait(100)
        return reserve(key)

    monkeypatch.setattr(site.store.limits, "reserve", slowly)

    async def both():
        def admit(info):
            caller = Caller(owner=info.id, scopes=info.scopes, key=info)
            return site.gate.admit_caller(caller, model=None, endpoint="/x", request_id="r")

        crowd = [asyncio.ensure_future(admit(large)) for _ in range(50)]
        while not waiting:
            await asyncio.sleep(0.001)
        ticket = await asyncio.wait_for(admit(small), 60)
        assert 0 < len(waiting) < 8  # of eight threads
        let_go.set()
        return ticket, await asyncio.gather(*crowd)

    ticket, tickets = site.loop.run_until_complete(both())
    assert ticket.reservation is not None
    assert len({entry.reservation.id for entry in tickets}) == 50


def test_another_machine_always_needs_a_key(site):
    site.client_address = "192.0.2.7"
    assert site.get("/v1/models").status_code == 401
    assert site.get("/v1/models", site.key()[1]).status_code == 200


def test_a_server_that_listens_publicly_lets_nobody_in_without_a_key(make_site):
    site = make_site(is_local_only=False)
    assert site.get("/v1/models").status_code == 401


def test_an_open_server_grants_inference_and_no_more(make_site):
    site = make_site(access=Access.OPEN)
    site.client_address = "192.0.2.7"
    assert site.chat().status_code == 200
    assert site.get("/v1/admin/keys").status_code == 403
    assert site.get("/metrics").status_code == 403
    _, admin = site.key(scopes=["admin"])
    assert site.get("/v1/admin/keys", admin).status_code == 200
    assert site.get("/v1/admin/keys", "bise-wrong").status_code == 401


@pytest.mark.parametrize(
    ("host", "access", "has_keys", "good"),
    [
        ("127.0.0.1", Access.AUTO, False, True),
        ("::1", Access.AUTO, False, True),
        ("localhost", Access.AUTO, False, True),
        ("0.0.0.0", Access.AUTO, False, False),
        ("::", Access.AUTO, False, False),
        ("192.0.2.1", Access.REQUIRED, False, False),
        ("example.com", Access.AUTO, False, False),
        ("0.0.0.0", Access.AUTO, True, True),
        ("0.0.0.0", Access.OPEN, False, True),
    ],
)
def test_a_public_address_without_a_key_is_refused_unless_forced(host, access, has_keys, good):
    if good:
        check_bind(host, access, has_keys)
        return
    with pytest.raises(ConfigError, match="no-key") as caught:
        check_bind(host, access, has_keys)
    assert caught.value.field == "host"


PATHS = ("/v1/models", "/v1/files", "/v1/usage", "/metrics", "/v1/admin/keys")
SCOPES = {
    "inference": (200, 200, 200, 403, 403),
    "tune": (200, 403, 200, 403, 403),
    "metrics": (200, 403, 200, 200, 403),
    "admin": (200, 403, 200, 200, 200),
}


def test_each_scope_opens_what_it_is_for_and_nothing_else(site):
    _give_stats(site)
    for scope, statuses in SCOPES.items():
        _, key = site.key(scopes=[scope])
        assert tuple(site.get(path, key).status_code for path in PATHS) == statuses
        assert site.chat(key).status_code == (200 if scope == "inference" else 403)


def _give_stats(site):
    site.engine.stats = lambda: SimpleNamespace(
        num_running=1,
        num_waiting=2,
        num_preemptions=0,
        num_blocks=(8,),
        num_free_blocks=(5,),
        num_cached_blocks=(2,),
        kv_bytes=99,
    )


def test_a_key_for_one_model_is_refused_another_but_not_its_alias(site):
    _, key = site.key(scopes=["inference", "model:stub"])
    assert site.chat(key).status_code == 200
    assert site.chat(key, model="stub-latest").status_code == 200
    _, other = site.key(scopes=["inference", "model:other"])
    assert site.chat(other).status_code == 403


def test_a_revoked_key_is_refused_by_the_next_request(site):
    info, key = site.key()
    assert site.chat(key).status_code == 200
    site.store.keys.revoke(info.id)
    assert site.chat(key).status_code == 401


def test_each_request_has_one_row_with_its_tokens(site):
    info, key = site.key(owner="ann")
    body = site.chat(key).json()
    (row,) = site.store.ledger.rows()
    assert (row.key_id, row.owner, row.model) == (info.id, "ann", "stub")
    assert row.prompt_tokens == body["usage"]["prompt_tokens"]
    assert row.completion_tokens == body["usage"]["completion_tokens"]
    assert (row.finish_reason, row.error_code) == ("stop", None)
    assert row.request_id.startswith("req_")


@pytest.mark.parametrize("stream", [False, True])
def test_failed_requests_have_a_row_too(site, stream):
    from bise.errors import EngineError

    site.engine.fails_with = EngineError("boom")
    site.chat(stream=stream)
    (row,) = site.store.ledger.rows()
    assert (row.finish_reason, row.error_code) == ("error", "engine_error")
    assert row.completion_tokens == 1  # what was computed before it failed


def test_an_unknown_model_has_a_row_without_tokens(site):
    assert site.chat(model="nope").status_code == 404
    (row,) = site.store.ledger.rows()
    assert (row.error_code, row.prompt_tokens) == ("model_not_found", 0)


def test_the_ledger_the_counters_and_the_answers_agree_exactly(site):
    _give_stats(site)
    prompt = completion = 0
    for number in range(12):
        site.engine.text = "x" * (number + 1)
        usage = site.chat(max_tokens=number % 5 + 1).json()["usage"]
        prompt += usage["prompt_tokens"]
        completion += usage["completion_tokens"]
    (total,) = site.store.ledger.sums()
    assert (total.requests, total.prompt_tokens, total.completion_tokens) == (12, prompt, completion)
    page = site.get("/metrics").text
    assert _metric(page, 'bise_tokens_total{kind="prompt",model="stub"}') == prompt
    assert _metric(page, 'bise_tokens_total{kind="completion",model="stub"}') == completion
    counted = [
        float(line.split()[-1]) for line in page.splitlines() if line.startswith("bise_requests_total")
    ]
    assert sum(counted) == 12


def _metric(page, name):
    return next(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name + " "))


def test_metrics_tell_of_the_engine_and_of_refusals(site):
    _give_stats(site)
    site.chat()
    assert site.get("/v1/models", "bise-wrong").status_code == 401
    page = site.get("/metrics").text
    assert _metric(page, 'bise_kv_blocks_free{model="stub"}') == 5
    assert _metric(page, 'bise_waiting_requests{model="stub"}') == 2
    assert _metric(page, 'bise_refused_total{reason="unauthenticated"}') == 1
    assert _metric(page, 'bise_time_to_first_token_seconds_count{model="stub"}') == 1


def test_requests_beyond_the_limit_get_429_with_the_time_to_wait(site):
    _, key = site.key(limits=KeyLimits(requests_per_minute=2))
    first, second, third = (site.chat(key) for _ in range(3))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [
        first.headers["x-ratelimit-remaining-requests"],
        second.headers["x-ratelimit-remaining-requests"],
    ] == [
        "1",
        "0",
    ]
    assert third.status_code == 429
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert third.headers["retry-after"] == "60"
    site.clock.now += 60
    assert site.chat(key).status_code == 200


def test_tokens_are_reserved_before_anything_is_computed(site):
    _, key = site.key(limits=KeyLimits(tokens_per_minute=50))
    refused = site.chat(key, max_tokens=60)
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false"
    assert site.engine.requests == []
    answer = site.chat(key, max_tokens=20)
    assert answer.status_code == 200
    used = answer.json()["usage"]["total_tokens"]
    # What was booked and not used is there again.
    assert site.chat(key, max_tokens=50 - used - (used - 13)).status_code == 200
    assert site.chat(key, max_tokens=40).status_code == 429


def test_a_limit_in_money_needs_a_price_and_holds(site):
    _, key = site.key(limits=KeyLimits(money_per_month=Decimal("0.01")))
    assert site.chat(key).status_code == 403
    price = Price(model="stub", input=Decimal(100), cached=Decimal(10), output=Decimal(100))
    site.store.prices.set(price)
    assert site.chat(key, max_tokens=101).status_code == 429
    answer = site.chat(key, max_tokens=13)
    usage = answer.json()["usage"]
    row = site.store.ledger.rows()[0]
    assert row.cost == Decimal(100) * usage["total_tokens"] / 1_000_000


def test_energy_and_machine_time_become_the_cost_of_the_house(make_site):
    joules = itertools.count(0, 3600)
    seconds = itertools.count(0, 10)
    site = make_site(shares=Shares(lambda: next(joules), lambda: next(seconds)))
    site.store.prices.set_rates(
        HouseRates(energy=Decimal("0.5"), hardware=Decimal(3_153_600), hardware_years=Decimal("0.1"))
    )
    site.chat()
    (row,) = site.store.ledger.rows()
    assert row.energy_j == 3600
    assert row.house_cost == Decimal("0.0005") + 10


def test_shares_of_energy_and_time_add_up_to_the_whole():
    now = [0.0]
    shares = Shares(lambda: 50 * now[0], lambda: now[0])
    shares.enter("a")
    now[0] = 2
    shares.enter("b")
    now[0] = 6
    assert shares.leave("a") == (4, 200)
    now[0] = 7
    assert shares.leave("b") == (3, 150)


def test_a_repeated_request_is_billed_once_and_another_body_is_a_conflict(site):
    _, key = site.key()
    for _ in range(3):
        assert site.chat(key, headers={"idempotency-key": "one"}).status_code == 200
    assert len(site.store.ledger.rows()) == 1
    assert site.chat(key, headers={"idempotency-key": "one"}, seed=5).status_code == 409
    assert len(site.store.ledger.rows()) == 1
    assert site.chat(key, headers={"idempotency-key": "x" * 300}).status_code == 400


def _break(site, monkeypatch):
    def refuse(*_, **__):
        raise DatabaseDownError(OSError("no such host db.internal"))

    for name in ("_session", "glance"):
        monkeypatch.setattr(type(site.store.database), name, refuse)


def test_a_database_that_is_down_lets_nobody_in_and_says_no_more_than_that(site, monkeypatch):
    _, key = site.key()
    with monkeypatch.context() as patch:
        _break(site, patch)
        for sent in (None, key, "bise-wrong"):
            response = site.chat(sent)
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert "internal" not in response.text
    assert site.chat(key).status_code == 200


def test_rows_of_requests_that_end_while_the_database_is_down_are_written_later(site, monkeypatch):
    _, key = site.key(limits=KeyLimits(concurrency=1))
    site.store.prices.set(Price(model="*", input=Decimal(1), cached=Decimal(1), output=Decimal(1)))
    with monkeypatch.context() as patch:

        def answer(request):
            _break(site, patch)
            return "done"

        site.engine.script = answer
        assert site.chat(key).status_code == 200
    site.engine.script = None
    assert site.store.ledger.rows() == []
    assert site.gate.write_late() == 0
    (row,) = site.store.ledger.rows()
    assert row.completion_tokens == 4
    assert row.cost > 0
    assert site.chat(key).status_code == 200  # the place was settled too


def test_nobody_is_let_in_while_too_many_rows_wait(site, monkeypatch):
    monkeypatch.setattr("bise.server.gate.MAX_UNWRITTEN", 0)
    assert site.chat().status_code == 503


def test_a_prompt_that_breaks_a_rule_is_refused_before_generation(site):
    _, key = site.key(rules=[Rule(name="secret", pattern="(?i)project x", stage="input")])
    response = site.chat(key, messages=[{"role": "user", "content": "tell me of PROJECT X"}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "content_policy_violation"
    assert "PROJECT" not in response.text
    assert site.engine.requests == []
    (row,) = site.store.ledger.rows()
    assert (row.rule, row.error_code) == ("secret", "content_policy_violation")
    assert site.chat(key).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "of Pro"},
                                                   {"type": "text", "text": "ject X"}]}]},
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "", "tool_calls": [
                          {"id": "abcdefghi", "function": {"name": "f", "arguments": {"q": "project x"}}}]},
                      {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}]},
        {"tools": [{"type": "function",
                    "function": {"name": "f", "description": "Project X", "parameters": {}}}]},
    ],
)  # fmt: skip
def test_guardrails_read_whatever_the_model_reads(site, fields):
    _, key = site.key(rules=[Rule(name="secret", pattern="(?i)project x", stage="input")])
    response = site.chat(key, **fields)
    assert (response.status_code, response.json()["code"]) == (400, "content_policy_violation")
    assert site.engine.requests == []


def test_guardrails_read_the_suffix_of_a_completion(site):
    _, key = site.key(rules=[Rule(name="secret", pattern="(?i)project x", stage="input")])
    body = {"model": "stub", "prompt": "a", "suffix": "of project x"}
    assert site.post("/v1/completions", key, json=body).json()["code"] == "content_policy_violation"
    assert site.post("/v1/fim/completions", key, json=body).json()["code"] == "content_policy_violation"


def test_sums_and_metrics_go_by_route_not_by_what_clients_write_into_paths(site):
    for number in range(3):
        assert site.get(f"/v1/responses/resp_{number}").status_code == 404
    site.chat()
    assert {row.endpoint for row in site.store.ledger.rows()} == {
        "/v1/responses/{response_id}",
        "/v1/chat/completions",
    }
    assert "resp_" not in site.get("/metrics").text.replace("/v1/responses/{response_id}", "")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_breaks_a_rule_is_never_seen(site, stream):
    _, key = site.key(rules=[Rule(name="words", pattern="forbidden", stage="output")])
    site.engine.text = "this is forbidden text"
    response = site.chat(key, stream=stream)
    assert "content_policy_violation" in response.text
    assert "this is" not in response.text
    (row,) = site.store.ledger.rows()
    assert (row.rule, row.completion_tokens) == ("words", 22)
    site.engine.text = "this is fine"
    assert "this is fine".replace(" ", "") in re.sub(r'[^a-z]', "", "".join(
        re.findall(r'"content": ?"([^"]*)"', site.chat(key, stream=stream).text)))  # fmt: skip


def test_logs_hold_no_prompt_no_answer_and_no_key(site, caplog):
    _, key = site.key()
    site.engine.text = "the-answer-text"
    with caplog.at_level(logging.DEBUG):
        site.chat(key, messages=[{"role": "user", "content": "the-prompt-text"}])
        site.chat("bise-some-wrong-key")
        site.chat(key, model="x\nevent=forged", unknown_field="the-prompt-text")
    for secret in ("the-prompt-text", "the-answer-text", key, "bise-some-wrong-key"):
        assert secret not in caplog.text
    assert "\nevent=forged" not in caplog.text


def test_nothing_in_the_database_is_the_users_text(site):
    _, key = site.key()
    site.engine.text = "the-answer-text"
    site.chat(key, messages=[{"role": "user", "content": "the-prompt-text"}], user="someone")
    with site.store.database.reading() as session:
        tables = inspect(session.connection()).get_table_names()
        dump = "".join(repr(session.execute(text(f"SELECT * FROM {name}")).all()) for name in tables)
    assert "stub" in dump
    assert "the-prompt-text" not in dump
    assert "the-answer-text" not in dump
