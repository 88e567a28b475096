"""POST /v1/tokenize and /v1/detokenize: what the model sees."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.errors import RequestError
from bise.server.body import read_json
from bise.server.conversation import prepared
from bise.server.fitting import encoded
from bise.server.logprobs import token_name
from bise.server.openapi import documented
from bise.server.service import Job, Service
from bise.server.text_schema import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/v1/tokenize", **documented(TokenizeRequest, "Show the tokens of a text.", tag="tokens"))
async def tokenize(request: Request) -> Response:
    """Return the tokens of a text or a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request, TokenizeRequest)
    job = await service.open(request, model=body.model, scope="read")
    try:
        ids = await service.offload(_ids, job, body)
        names = None
        if body.return_token_strs:
            names = [token_name(job.loaded.tokenizer, token_id) for token_id in ids]
        limit = job.loaded.engine.max_context
        return job.answer(
            {"count": len(ids), "max_model_len": limit, "tokens": list(ids), "token_strs": names}
        )
    finally:
        await job.finish("stop")


@router.post("/v1/detokenize", **documented(DetokenizeRequest, "Show the text of tokens.", tag="tokens"))
async def detokenize(request: Request) -> Response:
    """Return the text of tokens; control tokens have none."""
    service: Service = request.app.state.service
    body = await read_json(request, DetokenizeRequest)
    job = await service.open(request, model=body.model, scope="read")
    try:
        size = job.loaded.tokenizer.vocab_size
        known = [token_id for token_id in body.tokens if token_id < size]
        if len(known) < len(body.tokens):
            raise RequestError(f"tokens has {max(body.tokens)}; the vocabulary has {size}", field="tokens")
        text = await service.offload(job.loaded.tokenizer.decode, known)
        return job.answer({"prompt": text, "text": text})
    finally:
        await job.finish("stop")


def _ids(job: Job, body: TokenizeRequest) -> tuple[int, ...]:
    tokenizer = job.loaded.tokenizer
    if body.messages is not None:
        return encoded(job, prepared(body.messages), body.tools)
    assert body.prompt is not None
    ids = tuple(tokenizer.encode(body.prompt))
    starts = body.add_special_tokens is not False and tokenizer.adds_bos and tokenizer.bos_id is not None
    return (tokenizer.bos_id, *ids) if starts and tokenizer.bos_id is not None else ids
