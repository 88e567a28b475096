"""A new chat with a summary: an answer like any other, written from all that was said, in steps at need."""

from __future__ import annotations

import json

import pytest

from bise.assistant.scripted import ScriptedModels
from bise.assistant.titles import next_title

API = "/api/v1"
SUMMARY = "They spoke of the wind."


@pytest.fixture
def told(run, listening):
    """Return a function that runs an async test with a chat of a few turns; `window` in tokens."""

    def outside(scenario, *, window=32_768, turns=2, words=1, script=lambda _: SUMMARY, **fields):
        async def inside(site):
            made = await site.post(f"{API}/conversations", json={"title": "Winds", **fields})
            conversation, parent = made.json()["id"], None
            for number in range(turns):
                text = f"question {number} " + "wind " * words
                _, asked = await site.ask(text, conversation, parent_id=parent)
                parent = (await site.ended(asked["answer"]))["id"]
            site.models.jobs.clear()
            site.models.script = script
            await scenario(site, conversation)

        run(inside, models=listening(context=window))

    return outside


async def summed_up(site, conversation, **body):
    answer = await site.post(f"{API}/conversations/{conversation}/summary", json=body)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    return made["conversation"], await site.ended(made["answer"])


def test_a_new_chat_begins_with_what_the_old_one_said(told):
    async def scenario(site, conversation):
        made, answer = await summed_up(site, conversation)
        assert (made["title"], made["system"], made["folder"]) == ("Winds (2)", "Be brief.", "Air")
        assert (answer["text"], answer["status"], answer["parent_id"]) == (SUMMARY, "complete", None)
        (part,) = answer["parts"]
        assert (part["conversation_id"], part["messages"], part["is_small"]) == (conversation, 4, False)
        ((prompt,),) = site.models.asked
        assert prompt.index("User: question 0") < prompt.index("Assistant: Yes.") < prompt.index("question 1")
        assert "Be brief." not in prompt
        _, asked = await site.ask("And now?", made["id"], parent_id=answer["id"])
        await site.ended(asked["answer"])
        assert site.models.asked[-1][-2:] == [SUMMARY, "And now?"]
        assert [turn["role"] for turn in site.models.jobs[-1].messages] == [
            "system", "user", "assistant", "user",
        ]  # fmt: skip
        kept = await site.page(conversation)
        assert (kept["conversation"]["title"], kept["total"]) == ("Winds", 4)

    told(scenario, system="Be brief.", folder="Air")


def test_what_does_not_fit_the_window_is_read_in_steps_that_pass_on_what_they_know(told):
    async def scenario(site, conversation):
        _, answer = await summed_up(site, conversation)
        assert answer["status"] == "complete"
        asked = [prompt for (prompt,) in site.models.asked]
        assert len(asked) > 2
        assert all(SUMMARY in prompt for prompt in asked[1:])
        for number in range(5):
            assert sum(f"question {number} " in prompt for prompt in asked) == 1
        assert sum(prompt.count("wind ") + prompt.count("wind\n") for prompt in asked) >= 5 * 400 - 5
        for job in site.models.jobs:
            room = job.params["max_tokens"]
            assert await site.models.count("", job.messages) + room <= site.models.context
        assert [job.is_aside for job in site.models.jobs] == [True] * (len(asked) - 1) + [False]
        events = await site.events(answer["run_id"])
        told_of = [json.loads(event["data"]) for event in events if event.get("event") == "reading"]
        assert [entry["done"] for entry in told_of] == list(range(len(asked)))

    told(scenario, window=800, turns=5, words=400)


def test_a_summary_is_stopped_between_its_steps_and_made_again(told):
    async def scenario(site, conversation):
        site.models.delay_s = 30.0
        answer = (await site.post(f"{API}/conversations/{conversation}/summary", json={})).json()["answer"]
        while not site.models.jobs:
            await site.get(f"{API}/messages/{answer['id']}")
        assert (await site.delete(f"{API}/runs/{answer['run_id']}")).status_code == 204
        stopped = (await site.get(f"{API}/messages/{answer['id']}")).json()
        assert (stopped["status"], stopped["text"]) == ("stopped", "")
        site.models.delay_s = 0.0
        again = (await site.post(f"{API}/messages/{answer['id']}/regenerate", json={})).json()
        assert (await site.ended(again))["text"] == SUMMARY
        assert len(again["siblings"]) == 2

    told(scenario, window=800, turns=3, words=400)


def test_a_summary_that_was_cut_goes_on_where_it_was_cut(told):
    async def scenario(site, conversation):
        made = (await site.post(f"{API}/conversations/{conversation}/summary", json={})).json()
        cut = await site.ended(made["answer"])
        assert cut["finish_reason"] == "length"
        more = (await site.post(f"{API}/messages/{cut['id']}/continue")).json()
        whole = await site.ended(more)
        assert whole["text"].startswith(cut["text"])
        assert len(whole["text"]) > len(cut["text"])
        assert site.models.jobs[-1].continues
        assert site.models.jobs[-1].messages[-1]["content"] == cut["text"]

    told(scenario, window=800, script=lambda _: SUMMARY * 200)


def test_a_small_model_says_that_it_is_one_and_a_window_too_small_says_so(told):
    async def scenario(site, conversation):
        facts = site.models.facts
        site.models.facts = lambda: [type(found)(id=found.id, title="", context=120, parameters=10**6,
                                                 state="ready") for found in facts()]  # fmt: skip
        _, answer = await summed_up(site, conversation)
        assert answer["parts"][0]["is_small"] is True
        assert answer["status"] == "error"
        assert "too small" in answer["error"]

    told(scenario)


def test_another_model_writes_it_again_as_long_as_its_own_window_lets_it_and_as_it_is_wanted(told):
    async def scenario(site, conversation):
        _, answer = await summed_up(site, conversation)
        assert answer["params"]["max_tokens"] == 1024
        facts = site.models.facts()
        small = type(facts[0])(id="tiny", title="", context=400, parameters=10**6, state="ready")
        site.models.facts = lambda: [*facts, small]
        body = {"model": "tiny", "hint": "shorter"}
        again = (await site.post(f"{API}/messages/{answer['id']}/regenerate", json=body)).json()
        written = await site.ended(again)
        assert (written["status"], written["parts"][0]["is_small"]) == ("complete", True)
        assert site.models.jobs[-1].params["max_tokens"] == 100
        assert "more briefly" in site.models.asked[-1][0]

    told(scenario)


def test_nothing_said_and_something_being_said_cannot_be_summed_up(run):
    async def scenario(site):
        empty = (await site.post(f"{API}/conversations", json={})).json()["id"]
        refused = await site.post(f"{API}/conversations/{empty}/summary", json={})
        assert (refused.status_code, "nothing was said" in refused.text) == (400, True)
        conversation, _ = await site.ask()
        refused = await site.post(f"{API}/conversations/{conversation}/summary", json={})
        assert refused.status_code == 409

    run(scenario, models=ScriptedModels(lambda _: "x", delay_s=30.0))


def test_a_temporary_chats_summary_is_temporary_and_a_deleted_one_cannot_be_read_again(told):
    async def scenario(site, conversation):
        made, answer = await summed_up(site, conversation)
        listed = (await site.get(f"{API}/conversations")).json()["conversations"]
        assert listed == []
        assert (await site.page(made["id"]))["conversation"]["temporary"] is True
        await site.delete(f"{API}/conversations/{conversation}")
        again = (await site.post(f"{API}/messages/{answer['id']}/regenerate", json={})).json()
        failed = await site.ended(again)
        assert (failed["status"], "not there any more" in failed["error"]) == ("error", True)

    told(scenario, temporary=True)


def test_documents_come_along(told):
    async def scenario(site, conversation):
        kind = {"content-type": "application/octet-stream"}
        path = f"{API}/conversations/{conversation}/documents?name=a.txt"
        await site.post(path, content=b"North", headers=kind)
        made, _ = await summed_up(site, conversation)
        assert [found["name"] for found in (await site.page(made["id"]))["documents"]] == ["a.txt"]

    told(scenario)


def test_titles_are_counted_on():
    assert [next_title(title) for title in ("Wind", "Wind (2)", "Wind (9)", "(2)", "")] == [
        "Wind (2)", "Wind (3)", "Wind (10)", "(2) (2)", "",
    ]  # fmt: skip
