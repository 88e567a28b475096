"""Models that other machines host, beside the local ones: the same routes, checks and ledger.

Every answer says that it left this machine (`x-bise-leaves-machine`), and so does the model's card.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from bise.engine.request import Timings, Usage
from bise.errors import RequestError
from bise.server.hosted_checks import fields_of, lie
from bise.server.hosted_client import HostedClient
from bise.server.problem import ApiError, as_api_error

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.hub.remotes import Remote
    from bise.server.service import Service
    from bise.server.ticket import Ticket

R = TypeVar("R")

MARK = {"x-bise-leaves-machine": "true"}
BYTES_PER_TOKEN = 3
"""For booking before the host has counted; few texts have more tokens."""


class HostedModels:
    """The hosted models that a server offers."""

    def __init__(self, remotes: Sequence[Remote] = ()) -> None:
        self._clients = {remote.spec.name: HostedClient(remote) for remote in remotes}

    def get(self, name: str) -> HostedClient | None:
        """Return the hosted model of that name; None for any other."""
        return self._clients.get(name)

    def names(self) -> list[str]:
        """Return the names of the hosted models."""
        return list(self._clients)

    def refuse(self, name: str) -> None:
        """Refuse a route that hosted models do not serve."""
        if name in self._clients:
            raise RequestError(
                f"{name} is hosted elsewhere and serves {', '.join(self._clients[name].spec.serves)} only; "
                "use a local model here",
                field="model",
            )

    def cards(self) -> list[dict[str, object]]:
        """Return the models as both clients read them."""
        return [hosted_card(client) for client in self._clients.values()]


def hosted_card(client: HostedClient) -> dict[str, object]:
    """Return a hosted model's card; what nobody here can know is not claimed."""
    names = (
        "fine_tuning", "vision", "ocr", "classification", "moderation", "audio",
        "audio_transcription", "audio_speech", "reasoning",
    )  # fmt: skip
    spec = client.spec
    return {
        "id": spec.name,
        "object": "model",
        "created": 0,
        "owned_by": "hosted elsewhere",
        "root": spec.model,
        "type": "base",
        "name": f"{spec.name} (leaves this machine)",
        "description": "Hosted elsewhere: prompts and answers leave this machine.",
        "capabilities": {
            "completion_chat": "chat" in spec.serves,
            "completion_fim": "fim" in spec.serves,
            "function_calling": "chat" in spec.serves,
            **dict.fromkeys(names, False),
        },
        "serves": list(spec.serves),
        "aliases": [],
        "deprecation": None,
        "default_model_temperature": None,
        "state": "hosted",
        "leaves_this_machine": True,
    }


class HostedJob:
    """One admitted request to a hosted model, from its ticket to its row in the ledger."""

    def __init__(self, service: Service, request: Request, ticket: Ticket, client: HostedClient) -> None:
        self.service = service
        self.request = request
        self.ticket = ticket
        self.client = client
        self.model = client.spec.name
        self.usage: Usage | None = None
        self.client_gone = False
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begun = time.monotonic()
        self._first: float | None = None
        self._finished = False
        self._watch = asyncio.create_task(self._watch_client())
        service.jobs.add(self)

    async def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Wait for the host; ends at once when the client leaves or the server stops."""
        from bise.server.service import ClientGoneError

        task = asyncio.create_task(work)
        await asyncio.wait({task, self._stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            self._first = self._first or time.monotonic()
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self.client_gone:
            raise ClientGoneError
        raise ApiError(503, "the server is stopping", code="server_stopping", headers={"retry-after": "5"})

    def leave(self) -> None:
        """The client has gone."""
        self.client_gone = True
        self.stop()

    def stop(self) -> None:
        """Ask no more."""
        if not self._stop.done():
            self._stop.set_result(None)

    async def finish(self, finish_reason: str | None, error: BaseException | None = None) -> None:
        """Settle and record; only the first call counts."""
        from bise.server.service import ClientGoneError

        if self._finished:
            return
        self._finished = True
        self._watch.cancel()
        self.service.jobs.discard(self)
        gone = self.client_gone or isinstance(error, ClientGoneError)
        now = time.monotonic()
        first = self._first or now
        await self.ticket.finish(
            model=self.model,
            usage=self.usage,
            timings=Timings(queue_s=0.0, prefill_s=first - self._begun, decode_s=now - first),
            finish_reason="abort" if gone else "error" if error is not None else finish_reason,
            error_code=None if error is None or gone else as_api_error(error).code,
        )

    async def _watch_client(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.leave()


def content_text(content: object) -> str:
    """Return the text of a message's content in either client's form, or refuse the answer."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [fields_of(part, "a part") for part in cast(list[object], content)]
        return "".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
    if not isinstance(content, str):
        raise lie("sent a content that is no text")
    return content


def usage_body_of(job: HostedJob) -> dict[str, object]:
    """Return the `usage` object of a job whose host has counted."""
    from bise.server.chat import usage_body

    assert job.usage is not None
    return usage_body(job.usage)
