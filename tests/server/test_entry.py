"""The assistant behind the gate: who gets in, and that its answers are in the ledger."""

from __future__ import annotations

import pytest

from bise.assistant.accounts import Accounts
from bise.assistant.models import Job, Piece
from bise.assistant.scripted import quick_hasher
from bise.engine.request import Timings, Usage
from bise.errors import AuthenticationError, EngineError
from bise.server.access import Access
from bise.server.entry import StorePeople
from bise.server.gate import PASS_COOKIE
from bise.server.metered_models import MeteredModels


def test_the_printed_link_lets_the_operators_browser_in_and_nobody_else(site):
    site.key()
    assert site.get("/v1/models").status_code == 401
    entered = site.get(f"/enter?pass={site.gate.local_pass}")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    headers = {"cookie": f"{PASS_COOKIE}={site.gate.local_pass}"}
    assert site.get("/v1/models", headers=headers).status_code == 200
    assert site.get("/v1/admin/keys", headers=headers).status_code == 403
    assert site.get("/v1/models", headers={"cookie": f"{PASS_COOKIE}=wrong"}).status_code == 401
    assert site.get(f"/enter?pass={site.gate.local_pass}x").status_code == 401
    assert site.get("/enter").status_code == 401


@pytest.mark.parametrize("access", [Access.REQUIRED, Access.OPEN])
def test_there_is_no_pass_where_everybody_or_nobody_needs_a_key(make_site, access):
    site = make_site(access=access)
    assert site.get(f"/enter?pass={site.gate.local_pass}").status_code == 401


def test_only_those_whom_the_gate_lets_in_make_the_first_account(make_site):
    site = make_site(is_local_only=False)
    _, key = site.key()
    people = StorePeople(site.gate, Accounts(site.store.database, quick_hasher()))

    def check(request):
        site.loop.run_until_complete(people.check_first(request.real))

    with pytest.raises(AuthenticationError):
        check(_Request("192.0.2.7"))
    check(_Request("192.0.2.7", authorization=f"Bearer {key}"))
    check(_Request("192.0.2.7", cookie=f"{PASS_COOKIE}={site.gate.local_pass}"))


class _Request:
    """As much of a request as people are told by."""

    def __init__(self, address="127.0.0.1", **headers):
        from starlette.requests import Request

        pairs = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
        self.real = Request(
            {
                "type": "http",
                "headers": pairs,
                "client": (address, 1),
                "path": "/",
                "method": "GET",
                "state": {},
            }
        )


def _person(site, request):
    people = StorePeople(site.gate, Accounts(site.store.database, quick_hasher()))
    try:
        return site.loop.run_until_complete(people.person(request.real)).owner
    except Exception as error:
        return getattr(error, "code", repr(error))


def test_the_assistant_is_this_machines_until_the_first_key(site):
    assert _person(site, _Request()) == "local"
    _, key = site.key(owner="ann")
    assert _person(site, _Request()) == "invalid_api_key"
    assert _person(site, _Request(cookie=f"{PASS_COOKIE}={site.gate.local_pass}")) == "local"
    assert _person(site, _Request(authorization=f"Bearer {key}")) == "ann"
    assert _person(site, _Request(authorization="Bearer bise-wrong")) == "invalid_api_key"
    assert _person(site, _Request("192.0.2.7", authorization=f"Bearer {key}")) == "ann"


class _Models:
    """Says three pieces; fails or ends as told."""

    def __init__(self, error=None):
        self.error = error

    async def stream(self, job):
        yield Piece(prefill=(0, 9))
        yield Piece(text="a", tokens=1)
        yield Piece(text="b", tokens=1)
        if self.error:
            raise self.error
        usage = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=3)
        timings = Timings(queue_s=0.1, prefill_s=0.2, decode_s=0.3)
        yield Piece(text="c", tokens=1, finish_reason="stop", usage=usage, timings=timings)


def _run(site, models, stop_after=99):
    async def run():
        stream = MeteredModels(models, site.gate).stream(Job(model="stub", messages=(), tenant="ann"))
        count = 0
        async for _ in stream:
            count += 1
            if count == stop_after:
                break
        await stream.aclose()

    site.loop.run_until_complete(run())


def test_an_answer_of_the_assistant_has_its_row(site):
    _run(site, _Models())
    (row,) = site.store.ledger.rows()
    assert (row.owner, row.endpoint, row.finish_reason) == ("ann", "assistant", "stop")
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (9, 4, 3)
    assert row.decode_s == 0.3


def test_an_answer_that_was_left_has_a_row_with_the_tokens_made_until_then(site):
    _run(site, _Models(), stop_after=2)
    (row,) = site.store.ledger.rows()
    assert (row.prompt_tokens, row.completion_tokens, row.finish_reason) == (9, 1, "abort")


def test_an_answer_that_failed_has_a_row_with_its_error(site):
    with pytest.raises(EngineError):
        _run(site, _Models(EngineError("boom")))
    (row,) = site.store.ledger.rows()
    assert (row.completion_tokens, row.error_code) == (2, "engine_error")
