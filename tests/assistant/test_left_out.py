"""Leaving out the oldest turns at a person's wish: what the model is asked, what the answer says of it."""

from __future__ import annotations

import pytest

API = "/api/v1"


@pytest.fixture
def chat(run, listening):
    """Return a function that runs an async test with a site and a conversation there."""

    def outside(scenario):
        async def inside(site):
            made = await site.post(f"{API}/conversations", json={"title": "t"})
            await scenario(site, made.json()["id"])

        run(inside, models=listening())

    return outside


async def ask(site, conversation, text, parent=None, **fields):
    """Ask and wait for the answer; return question and answer."""
    _, asked = await site.ask(text, conversation, parent_id=parent, **fields)
    return asked["message"], await site.ended(asked["answer"])


def test_the_oldest_turns_stay_out_of_this_prompt_and_of_those_after_it(chat):
    async def scenario(site, conversation):
        first, one = await ask(site, conversation, "first")
        second, two = await ask(site, conversation, "second", one["id"])
        _, three = await ask(site, conversation, "third", two["id"], keep_from=second["id"])
        assert site.models.asked[-1] == ["second", "Yes.", "third"]
        assert three["parts"] == [{"type": "dropped", "messages": [first["id"], one["id"]]}]
        await ask(site, conversation, "fourth", three["id"])
        assert site.models.asked[-1] == ["second", "Yes.", "third", "Yes.", "fourth"]

    chat(scenario)


def test_another_answer_leaves_out_the_same_turns_and_the_context_does_not_count_them(chat):
    async def scenario(site, conversation):
        _, one = await ask(site, conversation, "first " * 100)
        before = (await site.post(f"{API}/conversations/{conversation}/context", json={})).json()["used"]
        second, two = await ask(site, conversation, "second", one["id"])
        _, three = await ask(site, conversation, "third", two["id"], keep_from=second["id"])
        again = (await site.post(f"{API}/messages/{three['id']}/regenerate", json={})).json()
        await site.ended(again)
        assert site.models.asked[-1] == ["second", "Yes.", "third"]
        after = (await site.post(f"{API}/conversations/{conversation}/context", json={})).json()["used"]
        assert after < before

    chat(scenario)


def test_only_a_question_of_the_branch_can_be_the_first_to_stay(chat):
    async def scenario(site, conversation):
        _, one = await ask(site, conversation, "first")
        for keep_from in (one["id"], "nobody"):
            body = {"text": "more", "parent_id": one["id"], "keep_from": keep_from}
            answer = await site.post(f"{API}/conversations/{conversation}/messages", json=body)
            assert answer.status_code == 400
            assert "keep_from" in answer.text

    chat(scenario)
