"""What becomes of the assistant's answers when the server is told to stop, and what reaches the disk."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import httpx
import pytest

from bise.assistant.scripted import ScriptedModels, quick_hasher
from bise.assistant.service import Assistant
from bise.store.database import Database
from bise.store.opening import Store

ANSWER = "".join(f"word{number:03d} " for number in range(100))
SECRET = "marmalade7391"


def scripted():
    """Return the contract tests' module of scripted models."""
    path = Path(__file__).parents[1] / "contract" / "scripted.py"
    spec = importlib.util.spec_from_file_location("scripted_for_stop", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scripted_for_stop"] = module
    spec.loader.exec_module(module)
    return module


class Server:
    """`bise serve` as the command line puts it together, with scripted answers, on this loop."""

    def __init__(self, folder, *, grace_s, pace_s):
        from bise.assistant.accounts import Accounts
        from bise.server.app import create_app
        from bise.server.assistant_app import assistant_routers
        from bise.server.entry import StorePeople
        from bise.server.gate import StoreGate
        from bise.server.limits import HttpLimits
        from bise.server.metered_models import MeteredModels
        from bise.server.serving import Serving, bind, url_of

        (folder / "files").mkdir(exist_ok=True)
        self.store = Store.open(str(folder / "bise.db"), folder=folder / "files", secret=folder / "secret")
        self.gate = StoreGate(self.store)
        fleet = scripted().ScriptedFleet()
        models = MeteredModels(ScriptedModels(lambda _: ANSWER, pace_s=pace_s, piece=8), self.gate)
        people = StorePeople(self.gate, Accounts(self.store.database, quick_hasher()))
        pages = assistant_routers(self.store.database, people, models)
        self.app = create_app(fleet, self.gate, routers=pages)
        models.service = self.app.service
        self.listener = bind("127.0.0.1", 0)
        self.ready = asyncio.Event()
        self.serving = Serving(self.app, limits=HttpLimits(), grace_s=grace_s, on_ready=self.ready.set)
        self.client = httpx.AsyncClient(base_url=f"{url_of(self.listener)}/api/v1")

    async def __aenter__(self):
        from bise.server.background import serve_all

        self.task = asyncio.create_task(serve_all(self.serving, self.app, self.gate, self.listener))
        await self.ready.wait()
        return self

    async def __aexit__(self, *_):
        self.serving.stop()
        await self.task
        await self.client.aclose()
        self.app.service.close()
        self.store.close()

    async def answer(self, conversation):
        return (await self.client.get(f"/conversations/{conversation}")).json()["messages"][1]


@pytest.mark.parametrize(("grace_s", "status"), [(20.0, "complete"), (0.0, "interrupted")])
def test_a_stop_lets_answers_end_within_the_grace_time_and_keeps_the_others_as_far_as_they_are(
    tmp_path, grace_s, status
):
    async def scenario():
        async with Server(tmp_path, grace_s=grace_s, pace_s=0.002 if grace_s else 0.05) as server:
            conversation = (await server.client.post("/conversations", json={})).json()["id"]
            asked = await server.client.post(f"/conversations/{conversation}/messages", json={"text": "Go"})
            run = asked.json()["answer"]["run_id"]
            heard = ""
            async with server.client.stream("GET", f"/runs/{run}/events") as response:
                async for line in response.aiter_lines():
                    if '"content":"' in line:
                        heard += line.split('"content":"')[1].split('"')[0]
                    if len(heard) >= 24:
                        break
        async with Server(tmp_path, grace_s=1.0, pace_s=0.0) as server:
            return heard, await server.answer(conversation)

    heard, answer = asyncio.run(scenario())
    assert answer["status"] == status
    assert answer["text"].startswith(heard)
    assert ANSWER.startswith(answer["text"])
    assert (answer["text"] == ANSWER) == (status == "complete")


@pytest.mark.parametrize("temporary", [True, False])
def test_of_a_temporary_chat_not_a_byte_reaches_the_disk(tmp_path, temporary):
    async def scenario():
        database = Database.open(str(tmp_path / "bise.db"))
        assistant = Assistant(database, ScriptedModels(lambda _: f"{SECRET} answers", context=2048))
        made = await assistant.create("ana", temporary=temporary, title=SECRET, system=SECRET)
        text = "\n\n".join(f"{SECRET} line {number} " * 20 for number in range(60)).encode()
        added = await assistant.add_document("ana", made.id, f"{SECRET}.txt", text)
        _, answer = await assistant.ask("ana", made.id, text=SECRET, parent_id=None, documents=[added.id])
        await asyncio.wait([assistant.runs.get(answer.run_id).task])
        page = await assistant.page("ana", made.id, before=None, limit=9)
        assert SECRET in page.messages[1].text
        assert page.messages[1].sources
        found = [
            path.name
            for path in tmp_path.rglob("*")
            if path.is_file() and SECRET.encode() in path.read_bytes()
        ]
        assert bool(found) is not temporary, found
        await assistant.close()
        database.close()
        left = [
            path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
        ]
        assert bool(left) is not temporary, left

    asyncio.run(scenario())
