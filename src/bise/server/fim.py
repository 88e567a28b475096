"""POST /v1/fim/completions: Mistral's fill-in-the-middle, answered in chat form."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.engine.request import Request as EngineRequest
from bise.server.body import read_json
from bise.server.chat import ChatAnswer, ChatOptions
from bise.server.hosted_text import fill_elsewhere
from bise.server.openapi import documented
from bise.server.prompts import fim_prompt
from bise.server.reading import Reading
from bise.server.service import Job, Service
from bise.server.text_schema import FimRequest

router = APIRouter()


@router.post("/v1/fim/completions", **documented(FimRequest, "Fill the middle of a text.", streams=True))
async def create_fim_completion(request: Request) -> Response:
    """Fill the gap between a prompt and a suffix."""
    service: Service = request.app.state.service
    body = await read_json(request, FimRequest)
    if (client := service.hosted.get(body.model)) is not None:
        return await fill_elsewhere(service, request, client, body)
    job = await service.open(request, model=body.model)
    try:
        wanted = await job.plan(_plan, body)
        await job.start([wanted], receipt=body.receipt)
        answer = ChatAnswer(job, ChatOptions(usage_chunk=body.wants_usage_chunk), Reading())
        return await answer.respond(stream=bool(body.stream))
    except BaseException as error:
        await job.finish(None, error)
        raise


def _plan(job: Job, body: FimRequest) -> EngineRequest:
    job.ticket.check_input([body.prompt, body.suffix or ""])
    job.around = lambda _, text: (body.prompt, text, body.suffix or "")
    prompt = fim_prompt(job, body.prompt, body.suffix or "")
    params = body.params(temperature=job.loaded.temperature, max_tokens=body.max_tokens)
    return EngineRequest(token_ids=prompt.token_ids, params=params, continuation=True, **body.run_options)
