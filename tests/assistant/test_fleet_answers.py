"""Answers and embeddings over a real engine: progress, whose prefixes stay, and vectors of passages."""

from __future__ import annotations

import array
import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from bise.assistant.models import FleetModels, Job
from bise.engine.fleet import Fleet
from bise.engine.model_spec import ModelSpec, load_planned
from bise.hub.registry import resolve


@pytest.fixture(scope="module")
def brise():
    with Fleet([ModelSpec(name="brise", path=resolve(None), context=1024, sequences=1)]) as fleet:
        yield fleet


def test_an_answer_tells_its_prefill_and_what_it_used(brise):
    async def scenario():
        params = {"max_tokens": 6, "seed": 1}
        job = Job(model="brise", messages=({"role": "user", "content": "Hello!"},), params=params)
        pieces = [piece async for piece in FleetModels(brise).stream(job)]
        told = next(piece for piece in pieces if piece.prefill is not None)
        assert told.prefill == (0, pieces[-1].usage.prompt_tokens)
        assert "".join(piece.text for piece in pieces)
        assert pieces[-1].finish_reason in ("stop", "length")

    asyncio.run(scenario())


def loaded_on_demand(told):
    """Return a fleet whose model is half read until `told` is set."""

    def load(spec, plan, progress):
        progress("reading weights", 0.5)
        assert told.wait(100)
        return load_planned(spec, plan, progress)

    return Fleet([ModelSpec(name="brise", path=resolve(None), context=256, sequences=1)], loader=load)


def test_an_answer_tells_how_much_of_its_model_is_read():
    told = threading.Event()

    async def scenario(fleet):
        shares = []
        job = Job(model="brise", messages=({"role": "user", "content": "Hi"},), params={"max_tokens": 1})
        async for piece in FleetModels(fleet).stream(job):
            if piece.loaded is not None:
                shares.append(piece.loaded)
                told.set()
        assert shares[0] == 0.5
        assert shares == sorted(shares)

    with loaded_on_demand(told) as fleet:
        asyncio.run(scenario(fleet))


def test_a_model_whose_answer_was_stopped_while_it_was_read_has_no_user_left():
    told = threading.Event()

    async def scenario(fleet):
        pieces = FleetModels(fleet).stream(Job(model="brise", messages=({"role": "user", "content": "Hi"},)))
        assert (await anext(pieces)).loaded == 0.5
        await pieces.aclose()
        told.set()
        async with asyncio.timeout(100):
            while fleet.card("brise").state != "ready" or fleet.card("brise").users:
                await asyncio.sleep(0.01)

    with loaded_on_demand(told) as fleet:
        asyncio.run(scenario(fleet))


def test_passages_that_say_the_same_lie_nearer_than_those_that_do_not(brise):
    async def scenario():
        texts = ["A river is a large stream of water.", "A stream of water is called a river.", "3 + 4 = 7"]
        made = await FleetModels(brise).embed("brise", texts)
        rows = [array.array("f", row) for row in made.rows]
        near = [sum(a * b for a, b in zip(rows[0], row, strict=True)) for row in rows]
        assert near[0] == pytest.approx(1.0, abs=1e-5)
        assert near[1] > near[2]
        assert made.usage.prompt_tokens > 10
        again = await FleetModels(brise).embed("brise", texts[:1])
        assert again.rows[0] == made.rows[0]

    asyncio.run(scenario())


@pytest.mark.parametrize(("folder", "kept"), [(None, True), (Path("/somewhere"), False)])
def test_a_temporary_chat_leaves_no_prefix_where_prefixes_reach_the_disk(brise, monkeypatch, folder, kept):
    card = brise.card("brise")
    monkeypatch.setattr(
        brise, "card", lambda name: replace(card, spec=replace(card.spec, prefix_cache_dir=folder))
    )
    seen = []
    lease = brise.acquire("brise")
    submit = lease.loaded.engine.submit
    monkeypatch.setattr(
        lease.loaded.engine, "submit", lambda request: seen.append(request) or submit(request)
    )

    async def scenario():
        messages = ({"role": "user", "content": "Hello!"},)
        job = Job(model="brise", messages=messages, params={"max_tokens": 1}, keeps_nothing=True)
        async for _ in FleetModels(brise).stream(job):
            pass

    asyncio.run(scenario())
    lease.release()
    assert [request.use_prefix_cache for request in seen] == [kept]
