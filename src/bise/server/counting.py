"""How many tokens a conversation has, for the count routes of all dialects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from bise.server.conversation import prepared
from bise.server.fitting import encoded
from bise.server.reading import Reading

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from bise.server.chat_schema import ChatRequest
    from bise.server.service import Job, Service


async def answer_count(
    request: Request,
    model: str,
    chat: Callable[[Job], Awaitable[ChatRequest]],
    body: Callable[[int], dict[str, object]],
) -> Response:
    """Answer with `body` of the number of prompt tokens that the request `chat` returns would have."""
    service: Service = request.app.state.service
    job = await service.open(request, model=model, scope="read")
    try:
        answer = body(await job.plan(_count, await chat(job)))
        await job.finish("stop")
        return job.answer(answer)
    except BaseException as error:
        await job.finish(None, error)
        raise


def _count(job: Job, chat: ChatRequest) -> int:
    """Return the length of the prompt; with the tools that the model would be told of."""
    return len(encoded(job, prepared(chat.messages), Reading.of(job, chat).shown_tools))
