"""The assistant's HTTP face over scripted models and an in-memory store."""

from __future__ import annotations

import asyncio
import json

import pytest

from bise.assistant.models import Piece
from bise.assistant.scripted import ScriptedModels
from bise.engine.request import Usage
from bise.server.assistant_people import OnePerson

ANSWER = (
    "The *bise* is a **cold** wind.\n\n```python\nprint('été')\n```\n\nIt blows from the north-east. " * 4
)


@pytest.fixture
def run(run):
    def outside(scenario, models=None):
        run(scenario, models=models or ScriptedModels(lambda _: ANSWER), people=OnePerson())

    return outside


class Held(ScriptedModels):
    """Wait within the answer after `most` pieces until `go` is set: what is asked meanwhile takes time."""

    def __init__(self, most):
        super().__init__(lambda _: ANSWER, pace_s=0.002)
        self.most = most
        self.go = asyncio.Event()

    async def stream(self, job):
        count = 0
        async for piece in super().stream(job):
            if piece.text and (count := count + 1) > self.most:
                await self.go.wait()
            yield piece


def text_of(events):
    return "".join(
        json.loads(event["data"])["choices"][0]["delta"]["content"]
        for event in events
        if "event" not in event
    )


def test_an_answer_streams_in_numbered_events_and_is_kept(run):
    async def scenario(site):
        conversation, asked = await site.ask()
        events = await site.events(asked["answer"]["run_id"])
        assert text_of(events) == ANSWER
        numbers = [int(event["id"]) for event in events]
        assert numbers == sorted(set(numbers))
        assert len(numbers) < numbers[-1]  # pieces that came at once are one
        end = json.loads(events[-1]["data"])
        assert events[-1]["event"] == "end"
        assert (end["status"], end["finish_reason"]) == ("complete", "stop")
        assert end["usage"]["completion_tokens"] > 10
        page = await site.page(conversation)
        assert [message["text"] for message in page["messages"]] == ["How does the bise form?", ANSWER]
        assert page["messages"][1]["status"] == "complete"
        # The question, until the model has found a title.
        assert page["conversation"]["title"] in ("How does the bise form?", "The bise is a cold wind.")

    run(scenario)


@pytest.mark.parametrize("cut", [1, 3, 17])
def test_a_reload_in_mid_stream_loses_and_doubles_nothing(cut, run):
    async def scenario(site):
        conversation, asked = await site.ask()
        run_id = asked["answer"]["run_id"]
        while site.assistant.runs.get(run_id).seq < cut:
            await asyncio.sleep(0)
        live = (await site.page(conversation))["messages"][1]
        site.models.go.set()
        rest = await site.events(run_id, after=live["seq"])
        assert live["text"] + text_of(rest) == ANSWER
        assert len(live["text"]) < len(ANSWER)

    run(scenario, models=Held(60))


def test_two_tabs_hear_the_same(run):
    async def scenario(site):
        site.models.pace_s = 0.001
        _, asked = await site.ask()
        run_id = asked["answer"]["run_id"]
        first, second = await asyncio.gather(site.events(run_id), site.events(run_id))
        assert text_of(first) == text_of(second) == ANSWER
        assert first[-1] == second[-1]
        for event in first:  # whoever comes back goes on behind any number that was heard
            told = text_of([other for other in first if int(other["id"]) <= int(event["id"])])
            assert told + text_of(await site.events(run_id, after=int(event["id"]))) == ANSWER

    run(scenario)


def test_leaving_the_stream_does_not_stop_the_answer(run):
    async def scenario(site):
        site.models.pace_s = 0.001
        conversation, asked = await site.ask()
        listening = asyncio.create_task(site.events(asked["answer"]["run_id"]))
        await asyncio.sleep(0)
        listening.cancel()
        await asyncio.wait([site.assistant.runs.get(asked["answer"]["run_id"]).task])
        assert (await site.page(conversation))["messages"][1]["text"] == ANSWER

    run(scenario)


@pytest.mark.parametrize("when", ["at once", "before the first token", "in the middle"])
def test_stop_keeps_what_was_written(when, run):
    async def scenario(site):
        site.models.delay_s = 100.0 if when == "before the first token" else 0.0
        conversation, asked = await site.ask()
        run_id = asked["answer"]["run_id"]
        running = site.assistant.runs.get(run_id)
        while when != "at once" and running.status != ("running" if when == "in the middle" else "prefill"):
            await asyncio.sleep(0)
        stopped = await site.delete(f"/api/v1/runs/{run_id}")
        again = await site.delete(f"/api/v1/runs/{run_id}")
        assert (stopped.status_code, again.status_code) == (204, 204)
        answer = (await site.page(conversation))["messages"][1]
        assert answer["status"] == "stopped"
        assert ANSWER.startswith(answer["text"])
        assert len(answer["text"]) < len(ANSWER)
        assert (await site.events(run_id))[-1]["event"] == "end"

    run(scenario, models=Held(60))


def test_continue_writes_on_where_the_answer_was_cut(run):
    async def scenario(site):
        conversation = (await site.post("/api/v1/conversations", json={"params": {"max_tokens": 7}})).json()[
            "id"
        ]
        _, asked = await site.ask(conversation=conversation)
        await site.events(asked["answer"]["run_id"])
        cut = (await site.page(conversation))["messages"][1]
        assert (cut["finish_reason"], cut["text"]) == ("length", ANSWER[:28])
        answer = (await site.post(f"/api/v1/messages/{cut['id']}/continue")).json()
        await site.events(answer["run_id"])
        assert (await site.page(conversation))["messages"][1]["text"] == ANSWER[:56]

    run(scenario)


def test_regenerate_and_edit_make_branches_that_can_be_shown(run):
    async def scenario(site):
        conversation, asked = await site.ask("one")
        await site.events(asked["answer"]["run_id"])
        again = (
            await site.post(
                f"/api/v1/messages/{asked['answer']['id']}/regenerate", json={"model": "scripted-7b"}
            )
        ).json()
        await site.events(again["run_id"])
        page = await site.page(conversation)
        assert page["messages"][1]["model"] == "scripted-7b"
        assert page["messages"][1]["siblings"] == [asked["answer"]["id"], again["id"]]
        _, edited = await site.ask("one, edited", conversation)
        await site.events(edited["answer"]["run_id"])
        page = await site.page(conversation)
        assert [message["text"] for message in page["messages"]] == ["one, edited", ANSWER]
        assert len(page["messages"][0]["siblings"]) == 2
        await site.patch(f"/api/v1/conversations/{conversation}", json={"leaf": asked["message"]["id"]})
        page = await site.page(conversation)
        assert [message["id"] for message in page["messages"]] == [asked["message"]["id"], again["id"]]

    run(scenario)


def test_the_same_client_id_asks_once(run):
    async def scenario(site):
        conversation, first = await site.ask(client_id="c1")
        _, second = await site.ask(conversation=conversation, client_id="c1")
        assert first["message"]["id"] == second["message"]["id"]
        assert first["answer"]["run_id"] == second["answer"]["run_id"]

    run(scenario)


def test_a_failed_answer_keeps_its_text_and_says_why(run):
    async def scenario(site):
        site.models.script = lambda _: "abcdFAIL"
        conversation, asked = await site.ask()
        events = await site.events(asked["answer"]["run_id"])
        answer = (await site.page(conversation))["messages"][1]
        assert (answer["status"], answer["text"]) == ("error", "abcd")
        assert "FAIL" in answer["error"]
        assert json.loads(events[-1]["data"])["status"] == "error"

    run(scenario)


def test_a_restart_marks_half_written_answers_as_interrupted(run, open_site):
    async def scenario(site):
        site.models.pace_s = 0.001
        conversation, asked = await site.ask()
        while site.assistant.runs.get(asked["answer"]["run_id"]).seq < 5:
            await asyncio.sleep(0)
        site.assistant.runs.get(asked["answer"]["run_id"]).task.cancel()
        await asyncio.sleep(0)
        again = open_site(storage=site.storage)
        answer = (await again.page(conversation))["messages"][1]
        assert answer["status"] == "interrupted"
        await again.close()

    run(scenario)


def test_search_finds_words_without_accents_in_titles_and_texts(run):
    async def scenario(site):
        conversation, asked = await site.ask("Où passer l'été ?")
        await site.events(asked["answer"]["run_id"])
        other, asked = await site.ask("Something else")
        await site.events(asked["answer"]["run_id"])

        async def ids(query):
            answer = await site.get("/api/v1/conversations", params={"q": query})
            return [found["id"] for found in answer.json()["conversations"]]

        assert await ids("ete pass") == [conversation]
        assert set(await ids("north")) == {conversation, other}
        assert await ids('"; DROP TABLE') == []
        await site.delete(f"/api/v1/conversations/{conversation}")
        assert await ids("ete pass") == []
        await site.post(f"/api/v1/conversations/{conversation}/restore")
        assert await ids("ete pass") == [conversation]

    run(scenario)


def test_a_temporary_chat_never_reaches_the_storage(run):
    async def scenario(site):
        made = await site.post("/api/v1/conversations", json={"temporary": True})
        conversation, asked = await site.ask("secret", made.json()["id"])
        await site.events(asked["answer"]["run_id"])
        page = await site.page(conversation)
        assert page["messages"][1]["text"] == ANSWER
        assert page["conversation"]["temporary"]
        with site.storage.reading() as session:
            from sqlalchemy import text

            for table in ("conversations", "messages", "message_search"):
                assert session.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0

    run(scenario)


def test_pages_of_a_long_transcript_join_up(run):
    async def scenario(site):
        site.models.script = lambda question: f"re {question}"
        site.models.piece = 100
        conversation, parent = None, None
        for number in range(12):
            conversation, asked = await site.ask(f"q{number}", conversation, parent_id=parent)
            await site.events(asked["answer"]["run_id"])
            parent = asked["answer"]["id"]
        last = await site.page(conversation, limit=10)
        assert last["has_earlier"]
        assert last["total"] == 24
        earlier = await site.page(conversation, limit=20, before=last["messages"][0]["id"])
        texts = [message["text"] for message in earlier["messages"] + last["messages"]]
        assert texts == [text for number in range(12) for text in (f"q{number}", f"re q{number}")]
        assert not earlier["has_earlier"]

    run(scenario)


def test_the_context_counts_with_the_servers_tokenizer(run):
    async def scenario(site):
        conversation, asked = await site.ask("x" * 400)
        await site.events(asked["answer"]["run_id"])
        answer = await site.post(f"/api/v1/conversations/{conversation}/context", json={"draft": "y" * 80})
        view = answer.json()
        assert view["window"] == 32768
        assert view["used"] == sum(segment["tokens"] for segment in view["segments"])
        assert {segment["kind"]: segment["tokens"] for segment in view["segments"]}["turn"] == 20
        assert view["cached"] > 0

    run(scenario)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 403),
        ({"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, 201),
    ],
)
def test_what_another_site_sends_changes_nothing(headers, status, run):
    async def scenario(site):
        answer = await site.post(
            "/api/v1/conversations", content="{}", headers={"content-type": "application/json"} | headers
        )
        assert answer.status_code == status

    run(scenario)


def test_what_no_database_keeps_or_readers_disagree_about_is_refused(run):
    async def scenario(site):
        made = (await site.post("/api/v1/conversations", json={})).json()["id"]
        path = f"/api/v1/conversations/{made}"
        kind = {"content-type": "application/json"}
        for content in (
            rb'{"text":"a\ud800"}',
            rb'{"text":"a\u0000"}',
            b'{"text":"a","text":"b"}',
            b"[" * 100_000,
            b'{"text":"a","parent_id":NaN}',
        ):
            answer = await site.post(f"{path}/messages", content=content, headers=kind)
            assert answer.status_code in (400, 422), answer.text
        for body in ({"title": "a\0"}, {"folder": "\0"}, {"system": "\0"}, {"title": 7}, {"nothing": 1}):
            assert (await site.patch(path, json=body)).status_code == 400, body
        for place in (
            "conversations/a%00",
            "conversations?q=%00",
            "conversations?cursor=1_%00",
            "messages/%00",
        ):
            answer = await site.get(f"/api/v1/{place}")
            assert answer.status_code == 400, place
        assert (await site.page(made))["messages"] == []

    run(scenario)


def test_a_run_tells_who_waits_before_it_and_what_the_model_thinks(run):
    async def scenario(site):
        async def stream(job):
            yield Piece(prefill=(0, 9))
            yield Piece(before=2, prefill=(0, 9))
            yield Piece(before=1, prefill=(0, 9))
            yield Piece(before=0, prefill=(5, 9))
            yield Piece(thought="Hm. ", tokens=1)
            yield Piece(thought="So.", tokens=1)
            usage = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=3)
            yield Piece(text="Yes", tokens=1, finish_reason="stop", usage=usage, cost="0.25", currency="CHF")

        site.models.stream = stream
        conversation, asked = await site.ask()
        events = [
            (event.get("event"), json.loads(event["data"]))
            for event in await site.events(asked["answer"]["run_id"])
        ]
        states = [(body["status"], body["before"]) for kind, body in events if kind == "state"]
        assert states == [("prefill", 0), ("queued", 2), ("queued", 1), ("prefill", 0), ("running", 0)]
        assert ("prefill", {"done": 5, "total": 9}) in events
        answer = (await site.page(conversation))["messages"][1]
        (part,) = answer["parts"]
        assert (part["type"], part["text"]) == ("thinking", "Hm. So.")
        assert part["seconds"] >= 0
        assert answer["text"] == "Yes"
        assert (answer["usage"]["cost"], answer["usage"]["currency"]) == ("0.25", "CHF")

    run(scenario)


def test_a_branch_that_is_not_on_screen_can_be_read_and_stays_off_it(run):
    async def scenario(site):
        conversation, asked = await site.ask()
        first = await site.ended(asked["answer"])
        again = (await site.post(f"/api/v1/messages/{first['id']}/regenerate", json={})).json()
        await site.ended(again)
        shown = [message["id"] for message in (await site.page(conversation))["messages"]]
        other = [message["id"] for message in (await site.page(conversation, leaf=first["id"]))["messages"]]
        assert (shown[1], other[1]) == (again["id"], first["id"])
        assert [message["id"] for message in (await site.page(conversation))["messages"]] == shown
        path = f"/api/v1/conversations/{conversation}"
        assert (await site.get(path, params={"leaf": "0" * 36})).status_code == 404

    run(scenario)


def test_stopping_what_is_over_long_ago_does_nothing(run):
    async def scenario(site):
        _, asked = await site.ask()
        answer = await site.ended(asked["answer"])
        site.assistant.runs._runs.clear()  # as two minutes later
        assert (await site.delete(f"/api/v1/runs/{answer['run_id']}")).status_code == 204
        assert (await site.delete(f"/api/v1/runs/{'0' * 36}")).status_code == 404
        assert (await site.get(f"/api/v1/messages/{answer['id']}")).json() == answer

    run(scenario)


def test_what_was_deleted_long_enough_ago_goes_while_the_server_runs(run, monkeypatch):
    monkeypatch.setattr("bise.assistant.service.PURGE_S", 0.01)
    monkeypatch.setattr("bise.assistant.conversations.KEEP_DELETED_S", 0.0)

    async def scenario(site):
        made = (await site.post("/api/v1/conversations", json={})).json()["id"]
        house = asyncio.create_task(site.assistant.keep_house())
        await site.delete(f"/api/v1/conversations/{made}")
        async with asyncio.timeout(60):
            while (await site.post(f"/api/v1/conversations/{made}/restore")).status_code == 200:
                await site.delete(f"/api/v1/conversations/{made}")
                await asyncio.sleep(0.02)
        house.cancel()

    run(scenario)
