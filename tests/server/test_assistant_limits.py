"""People in the assistant are let in, limited, checked and recorded like keys over the API."""

from __future__ import annotations

import asyncio
import json
import time
from decimal import Decimal

import pytest
from sqlalchemy import text

from bise.assistant.scripted import ScriptedModels
from bise.server.assistant_people import COOKIE
from bise.server.entry import ASKS
from bise.store.prices import Price
from bise.store.rules import Rule

ANSWER = "The bise is a cold wind from the north-east."
PASSWORD = "a long password"


@pytest.fixture
def place(make_site):
    """A site with an assistant; `place.ask` asks as whoever `place.cookie` (or a key) is."""
    site = make_site(chats=ScriptedModels(lambda _: ANSWER, names=("stub",)))
    site.cookie = None
    return site


def call(site, method, path, key=None, **options):
    headers = {"cookie": f"{COOKIE}={site.cookie}"} if site.cookie else {}
    return site.request(method, f"/api/v1{path}", key, headers=headers, **options)


def sign_up(site, name="ann"):
    """Make an account, the first one or by the admin who is signed in, and sign in as it."""
    first = site.cookie is None
    path = "/first-account" if first else "/accounts"
    made = call(site, "POST", path, json={"name": name, "password": PASSWORD})
    assert made.status_code in (200, 201), made.text
    site.cookie = None
    answer = call(site, "POST", "/sign-in", json={"name": name, "password": PASSWORD})
    site.cookie = answer.cookies[COOKIE]


def ask(site, text="How?", key=None, conversation=None):
    """Ask and wait for the end; return (status of the request, the answer's message or the refusal)."""
    if conversation is None:
        conversation = call(site, "POST", "/conversations", key, json={}).json()["id"]
    posted = call(site, "POST", f"/conversations/{conversation}/messages", key, json={"text": text})
    if posted.status_code != 201:
        return posted.status_code, posted.json()
    return 201, ended(site, posted.json()["answer"], key)


def ended(site, message, key=None):
    """Wait for an answer and return it."""
    until = time.monotonic() + 100
    while message["status"] not in ("complete", "error", "stopped", "interrupted"):
        assert time.monotonic() < until
        site.loop.run_until_complete(asyncio.sleep(0.01))
        message = call(site, "GET", f"/messages/{message['id']}", key).json()
    return message


def test_the_routes_that_begin_an_answer_are_still_called_so(place):
    pending, paths = list(place.app.routes), set()
    while pending:
        route = pending.pop()
        pending += getattr(getattr(route, "original_router", None), "routes", [])
        paths.add(getattr(route, "path", ""))
    assert all(any(path.endswith(end) for path in paths) for end in ASKS)


def test_a_signed_in_user_is_limited_like_a_key(place):
    sign_up(place)
    place.store.allowances.change("ann", {"requests_per_minute": 2})
    assert [ask(place)[0] for _ in range(2)] == [201, 201]
    posted, refusal = ask(place)
    assert posted == 429
    assert "requests per minute" in json.dumps(refusal)
    place.clock.now += 61
    assert ask(place)[0] == 201


def test_another_user_is_not_concerned(place):
    sign_up(place)
    place.store.allowances.change("ann", {"requests_per_minute": 0})
    assert ask(place)[0] == 429
    sign_up(place, "bob")
    assert ask(place)[0] == 201


def test_limits_for_everyone_count_until_an_account_has_its_own(place):
    sign_up(place)
    place.store.allowances.change("*", {"requests_per_minute": 1})
    assert [ask(place)[0] for _ in range(2)] == [201, 429]
    place.store.allowances.change("ann", {"requests_per_minute": 3})
    assert [ask(place)[0] for _ in range(3)] == [201, 201, 429]


def test_an_answer_may_be_as_long_as_the_allowance_lets_it_and_no_longer(place):
    sign_up(place)
    place.store.allowances.change("ann", {"tokens_per_day": 8})
    _, message = ask(place)
    prompt = message["usage"]["prompt_tokens"]
    assert message["finish_reason"] == "length"
    assert prompt + message["usage"]["completion_tokens"] == 8
    posted, refusal = ask(place)
    assert (posted, "tokens per day" in json.dumps(refusal)) == (429, True)


def test_a_limit_that_only_the_prompt_shows_ends_the_answer_with_its_reason(place):
    sign_up(place)
    place.store.allowances.change("ann", {"tokens_per_day": 20})
    posted, message = ask(place, "long " * 200)
    assert (posted, message["status"]) == (201, "error")
    assert "tokens per day" in message["error"]
    (row,) = place.store.ledger.rows()
    assert (row.error_code, row.completion_tokens) == ("rate_limit_exceeded", 0)


def test_a_limit_in_money_says_which_model_has_no_price_to_who_asks_and_to_the_admin(place):
    sign_up(place)
    assert call(place, "GET", "/limits").json()["unpriced"] == ["stub"]
    call(place, "PATCH", "/limits/ann", json={"limits": {"money_per_month": "2.50"}})
    posted, message = ask(place)
    assert (posted, message["status"], message["text"]) == (201, "error", "")
    assert "your account has a limit in money" in message["error"]
    assert "'stub'" in message["error"]
    place.store.prices.set(Price(model="stub", input=Decimal(1), cached=Decimal(1), output=Decimal(1)))
    assert call(place, "GET", "/limits").json()["unpriced"] == []
    assert ask(place)[1]["status"] == "complete"


def first_row(place):
    """The row of the first answer: the one of its title may follow at any time."""
    return place.store.ledger.rows()[-1]


def test_each_answer_has_a_row_under_its_account(place):
    sign_up(place)
    ask(place)
    row = first_row(place)
    (account,) = place.store.allowances.list()
    assert (row.owner, row.endpoint, row.finish_reason) == (account.account_id, "assistant", "stop")
    assert row.completion_tokens > 0
    (by_key,) = place.store.ledger.sums("key")
    assert by_key.name == "ann"


def test_a_key_in_the_assistant_keeps_its_limits(place):
    _, key = place.key(limits=None)
    place.store.keys.change("k", {"requests_per_minute": 1})
    assert [ask(place, key=key)[0] for _ in range(2)] == [201, 429]
    assert place.chat(key).status_code == 429  # the same books
    assert place.store.ledger.rows()[0].key_id == place.store.keys.list()[0].id


@pytest.mark.parametrize(("stage", "pattern"), [("input", "forbidden"), ("output", "north-.ast")])
def test_guardrails_hold_in_the_assistant(place, stage, pattern):
    sign_up(place)
    rule = Rule(name="wind", pattern=pattern, stage=stage)
    place.store.allowances.change("ann", rules=[rule])
    _, message = ask(place, "forbidden question")
    assert message["status"] == "error"
    assert "wind" in message["error"]
    assert "north" not in message["text"]
    (row,) = place.store.ledger.rows()
    assert row.rule == "wind"
    assert (row.completion_tokens > 0) == (stage == "output")


def test_a_checked_answer_that_passes_comes_whole(place):
    sign_up(place)
    place.store.allowances.change("ann", rules=[Rule(name="x", pattern="hot", stage="output")])
    _, message = ask(place)
    assert (message["text"], message["status"]) == (ANSWER, "complete")
    row = first_row(place)
    assert row.completion_tokens == message["usage"]["completion_tokens"]


def test_an_answer_that_nobody_asks_for_any_more_is_still_its_accounts(place):
    from bise.assistant.models import Job

    sign_up(place)
    (account,) = place.store.allowances.list()
    place.store.allowances.change("ann", {"requests_per_minute": 0})

    async def run():
        job = Job(model="stub", messages=({"role": "user", "content": "x"},), tenant=account.account_id)
        return [piece async for piece in place.chats.stream(job)]

    with pytest.raises(Exception, match="requests per minute"):
        place.loop.run_until_complete(run())


def test_a_stop_waits_for_answers_and_then_keeps_what_there_is(make_site):
    site = make_site(chats=ScriptedModels(lambda _: ANSWER, names=("stub",), pace_s=0.02))
    site.cookie = None
    conversation = call(site, "POST", "/conversations", json={}).json()["id"]
    posted = call(site, "POST", f"/conversations/{conversation}/messages", json={"text": "x"}).json()

    async def stop():
        while not site.app.service.jobs:
            await asyncio.sleep(0.005)
        await site.app.service.end_jobs()

    site.loop.run_until_complete(stop())
    assert ended(site, posted["answer"])["status"] == "interrupted"
    assert site.store.ledger.rows()[0].finish_reason == "abort"


def test_everyone_sees_their_own_quota_and_only_admins_change_limits(place):
    sign_up(place)
    changed = call(place, "PATCH", "/limits/ann", json={"limits": {"tokens_per_day": 900}})
    assert changed.json()["limits"]["tokens_per_day"] == 900
    ask(place)
    mine = call(place, "GET", "/usage").json()
    assert mine["limits"] == {"tokens_per_day": 900}
    assert 0 < mine["used"]["tokens_per_day"] < 900
    assert mine["models"][0]["group"] == "stub"
    sign_up(place, "bob")
    assert call(place, "GET", "/usage/accounts").status_code == 403
    assert call(place, "PATCH", "/limits/bob", json={"limits": {"tokens_per_day": 1}}).status_code == 403
    assert call(place, "GET", "/limits").status_code == 403
    mine = call(place, "GET", "/usage").json()
    assert (mine["limits"], mine["used"], mine["month"]["requests"]) == ({}, {}, 0)


def test_the_admins_table_has_everybodys_limits_and_use_and_changes_them_from_the_next_request_on(place):
    sign_up(place)
    admin = place.cookie
    sign_up(place, "bob")
    assert ask(place)[0] == 201
    bob, place.cookie = place.cookie, admin
    ann, other = call(place, "GET", "/usage/accounts").json()["accounts"]
    assert (ann["name"], ann["month"]["requests"], other["month"]["requests"] > 0) == ("ann", 0, True)
    path = f"/limits/{other['id']}"
    body = {"limits": {"requests_per_minute": 0, "money_per_month": "2.50"}}
    assert call(place, "PATCH", path, json=body).json()["limits"]["money_per_month"] == "2.50"
    place.cookie = bob
    assert ask(place)[0] == 429
    place.cookie = admin
    body = {"limits": {"requests_per_minute": None, "money_per_month": None}}
    lifted = call(place, "PATCH", path, json=body).json()
    assert (lifted["limits"], lifted["limits_are_own"]) == ({"priority": 0}, False)
    call(place, "PATCH", "/limits/*", json={"limits": {"tokens_per_day": 5}})
    everyone, _, bobs = call(place, "GET", "/limits").json()["accounts"]
    assert (everyone["id"], everyone["limits"], bobs["limits"]) == ("*", bobs["limits"], everyone["limits"])
    place.cookie = bob
    assert call(place, "GET", "/usage").json()["limits"] == {"tokens_per_day": 5}
    assert ask(place)[0] == 429


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tokens_per_week": 1}, "tokens_per_week"),
        ({"tokens_per_day": -1}, "tokens_per_day"),
        ({"tokens_per_day": "many"}, "tokens_per_day"),
        ({"money_per_month": "NaN"}, "money_per_month"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_by_name_and_nothing_changes(place, body, reason):
    sign_up(place)
    refused = call(place, "PATCH", "/limits/ann", json={"limits": body})
    assert (refused.status_code, reason in refused.text) == (400, True)
    assert call(place, "GET", "/limits").json()["accounts"][1]["limits"] == {"priority": 0}
    assert call(place, "PATCH", "/limits/nobody", json={"limits": {}}).status_code == 404


def test_a_deleted_account_is_gone_with_all_it_had_but_its_rows_in_the_books(place):
    sign_up(place)
    admin = place.cookie
    sign_up(place, "bob")
    ask(place, "marmalade")
    account = place.store.allowances.get("bob").account_id
    bob, place.cookie = place.cookie, admin
    assert call(place, "DELETE", f"/accounts/{account}", json=None).status_code == 400
    gone = call(place, "DELETE", f"/accounts/{account}?name=Bob")
    assert (gone.status_code, gone.json()) == (200, {"id": account, "conversations": 1})
    place.cookie = bob
    assert call(place, "GET", "/bootstrap").status_code == 401
    place.cookie = admin
    with place.store.database.reading() as session:
        for query in (
            "SELECT id FROM messages",
            "SELECT text FROM message_search",
            "SELECT id FROM conversations",
            f"SELECT account_id FROM sign_ins WHERE account_id = '{account}'",
        ):
            assert session.scalars(text(query)).all() == []
    (row,) = [row for row in place.store.ledger.rows() if row.owner == account][-1:]
    assert row.completion_tokens > 0
    assert "bob" not in [entry.name for entry in place.store.ledger.sums("key")]
    assert call(place, "GET", "/usage/accounts").json()["accounts"][0]["name"] == "ann"


def test_accounts_limits_are_the_admins_over_the_api_too(place):
    sign_up(place)
    _, key = place.key("root", scopes=["admin"])
    _, plain = place.key("plain")
    path = "/v1/admin/accounts"
    assert place.get(path, plain).status_code == 403
    body = {"limits": {"requests_per_minute": 5}}
    assert place.request("PATCH", f"{path}/ann", key, json=body).json()["limits_are_own"] is True
    assert place.request("PATCH", f"{path}/nobody", key, json=body).status_code == 404
    names = [entry["name"] for entry in place.get(path, key).json()["data"]]
    assert names == ["*", "ann"]
    lifted = place.request("PATCH", f"{path}/ann", key, json={"limits": {"requests_per_minute": None}})
    assert "requests_per_minute" not in lifted.json()["limits"]
    refused = place.request("PATCH", f"{path}/ann", key, json={"limits": {"requests_per_week": 1}})
    assert (refused.status_code, "requests_per_week" in refused.text) == (400, True)


def test_a_summary_is_limited_and_recorded_like_an_answer(place):
    sign_up(place)
    _, message = ask(place)
    place.store.allowances.change("ann", {"requests_per_minute": 2})
    path = f"/conversations/{message['conversation_id']}/summary"
    made = call(place, "POST", path, json={})
    assert made.status_code == 201, made.text
    answer = ended(place, made.json()["answer"])
    assert (answer["status"], answer["usage"]["prompt_tokens"] > 0) == ("complete", True)
    counted = [row.prompt_tokens for row in place.store.ledger.rows() if row.endpoint == "assistant"]
    assert answer["usage"]["prompt_tokens"] in counted
    assert call(place, "POST", path, json={}).status_code == 429


def test_an_allowance_is_no_key(place):
    sign_up(place)
    ask(place)
    assert place.store.keys.list() == []
    assert not place.store.keys.any_exist()
    assert place.get("/v1/models").status_code == 200  # this machine still needs no key
