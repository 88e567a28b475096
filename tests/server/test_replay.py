"""Repeated requests: the first answer again, computed once and billed once."""

from __future__ import annotations

import asyncio

import httpx

AGAIN = {"idempotency-key": "one"}


def test_a_repeat_gets_the_first_answer_byte_for_byte_and_computes_nothing(site):
    _, key = site.key()
    first = site.chat(key, headers=AGAIN, temperature=1.0)
    repeats = [site.chat(key, headers=AGAIN, temperature=1.0) for _ in range(3)]
    assert all(answer.content == first.content for answer in repeats)
    assert [answer.headers.get("idempotent-replayed") for answer in (first, *repeats)] == [
        None,
        *["true"] * 3,
    ]
    assert len({answer.headers["x-request-id"] for answer in (first, *repeats)}) == 4
    assert len(site.engine.requests) == 1
    assert len(site.store.ledger.rows()) == 1


def test_a_stream_is_repeated_whole_with_its_content_type(site):
    first = site.chat(headers=AGAIN, stream=True)
    again = site.chat(headers=AGAIN, stream=True)
    assert again.content == first.content
    assert again.content.endswith(b"data: [DONE]\n\n")
    assert again.headers["content-type"] == first.headers["content-type"]
    assert len(site.engine.requests) == 1


def test_the_key_with_another_body_is_a_conflict_that_is_not_worth_a_retry(site):
    site.chat(headers=AGAIN)
    refused = site.chat(headers=AGAIN, seed=5)
    assert refused.status_code == 409
    assert refused.json()["code"] == refused.json()["error"]["code"] == "idempotency_key_reused"
    assert refused.json()["param"] == "Idempotency-Key"
    assert refused.headers["x-should-retry"] == "false"
    assert len(site.engine.requests) == 1


def test_owners_and_routes_do_not_share_keys(site):
    _, one = site.key("one")
    _, two = site.key("two")
    body = {"model": "stub", "prompt": "Hi"}
    assert site.chat(one, headers=AGAIN).json()["id"] != site.chat(two, headers=AGAIN).json()["id"]
    assert site.post("/v1/completions", one, headers=AGAIN, json=body).status_code == 200
    assert len(site.engine.requests) == 3


def test_a_repeat_needs_the_key_that_the_first_needed(site):
    _, key = site.key()
    site.chat(key, headers=AGAIN)
    assert site.chat(headers=AGAIN).status_code == 401
    assert site.chat("bise-wrong", headers=AGAIN).status_code == 401


def test_a_refusal_is_not_kept(site):
    assert site.chat(headers=AGAIN, temperature=9).status_code == 400
    assert site.chat(headers=AGAIN).status_code == 200


def test_a_failed_stream_is_not_kept(site):
    from bise.errors import NonFiniteError

    site.engine.fails_with = NonFiniteError("the logits are not finite")
    assert b"not finite" in site.chat(headers=AGAIN, stream=True).content
    site.engine.fails_with = None
    assert b"[DONE]" in site.chat(headers=AGAIN, stream=True).content
    assert len(site.engine.requests) == 2


def test_a_repeat_beside_the_first_waits_for_it(site):
    site.engine.token_s = 0.02
    body = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}]}

    async def both():
        transport = httpx.ASGITransport(site.app, client=("127.0.0.1", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            calls = (client.post("/v1/chat/completions", json=body, headers=AGAIN) for _ in range(3))
            return await asyncio.gather(*calls)

    answers = site.loop.run_until_complete(both())
    assert len({answer.content for answer in answers}) == 1
    assert len(site.engine.requests) == 1


def test_a_repeat_of_what_takes_long_is_told_to_come_back(site, monkeypatch):
    from bise.server import replay

    monkeypatch.setattr(replay, "_WAIT_S", 0.1)
    site.engine.go.clear()
    body = {"model": "stub", "messages": [{"role": "user", "content": "Hi"}]}

    async def both():
        transport = httpx.ASGITransport(site.app, client=("127.0.0.1", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=body, headers=AGAIN))
            while not site.engine.requests:
                await asyncio.sleep(0.01)
            second = await client.post("/v1/chat/completions", json=body, headers=AGAIN)
            site.engine.go.set()
            return await first, second

    first, second = site.loop.run_until_complete(both())
    assert first.status_code == 200
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_key_in_use")
    assert second.headers["retry-after"] == "1"


def test_a_batch_is_queued_once(site):
    file_id = site.upload(content=b'{"custom_id": "a", "body": {}}\n').json()["id"]
    body = {"endpoint": "/v1/chat/completions", "input_files": [file_id], "model": "stub"}
    first = site.post("/v1/batch/jobs", json=body, headers=AGAIN).json()
    assert site.post("/v1/batch/jobs", json=body, headers=AGAIN).json() == first
    assert site.get("/v1/batch/jobs").json()["total"] == 1


def test_where_a_key_would_mean_nothing_it_is_refused(site):
    files = {"file": ("a.jsonl", b"{}\n")}
    refused = site.post("/v1/files", headers=AGAIN, files=files, data={"purpose": "batch"})
    assert (refused.status_code, refused.json()["param"]) == (400, "Idempotency-Key")
    for given in ("x" * 300, "", "a\tb"):
        assert site.chat(headers={"idempotency-key": given}).status_code == 400


def test_an_answer_that_cannot_be_kept_is_still_given(site, monkeypatch):
    from bise.errors import StoreError

    def broken(*_):
        raise StoreError("the database cannot be used now")

    monkeypatch.setattr(type(site.store.replays), "finish", broken)
    monkeypatch.setattr(type(site.store.replays), "release", broken)
    assert site.chat(headers=AGAIN).status_code == 200
