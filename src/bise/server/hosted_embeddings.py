"""Texts turned into vectors by hosted models."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, cast

from starlette.responses import JSONResponse, Response

from bise.errors import RequestError
from bise.server.hosted import BYTES_PER_TOKEN, MARK, HostedJob
from bise.server.hosted_checks import fields_of, lie, usage_of
from bise.server.hosted_client import HostedClient

if TYPE_CHECKING:
    from starlette.requests import Request

    from bise.server.service import Service
    from bise.server.text_schema import EmbeddingRequest


async def embed_elsewhere(
    service: Service, request: Request, client: HostedClient, body: EmbeddingRequest
) -> Response:
    """Turn texts into vectors with a hosted model."""
    client.check_serves("embeddings")
    ticket = await service.gate.admit(request, scope="inference", model=body.model)
    job = HostedJob(service, request, ticket, client)
    try:
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not all(isinstance(text, str) and text for text in texts):
            raise RequestError("input must be texts for a model that is hosted elsewhere", field="input")
        if body.encoding_format == "base64" or body.output_dtype not in (None, "float"):
            raise RequestError(
                "encoding_format and output_dtype must be float for a model that is hosted elsewhere",
                field="encoding_format",
            )
        if body.pooling is not None:
            raise RequestError("a model that is hosted elsewhere takes no pooling", field="pooling")
        ticket.check_input(cast(list[str], texts))
        size = sum(len(str(text).encode()) for text in texts)
        await ticket.reserve(model=job.model, prompt_tokens=size // BYTES_PER_TOKEN + 16, max_tokens=0)
        wanted: dict[str, Any] = {"model": client.spec.model, "input": texts}
        if (dimensions := body.dimensions or body.output_dimension) is not None:
            key = "output_dimension" if client.spec.dialect == "mistral" else "dimensions"
            wanted[key] = dimensions
        answer = await job.run(client.ask("/embeddings", wanted))
        job.usage = usage_of(answer)
        data = _vectors(answer.get("data"), len(texts), dimensions)
        await job.finish("stop")
        counts = {"prompt_tokens": job.usage.prompt_tokens, "completion_tokens": 0}
        return JSONResponse(
            {
                "id": f"embd-{secrets.token_hex(12)}", "object": "list", "model": job.model, "data": data,
                "usage": counts | {"total_tokens": job.usage.prompt_tokens},
            },
            headers={**ticket.headers, **MARK},
        )  # fmt: skip
    except BaseException as error:
        await job.finish(None, error)
        raise


def _vectors(data: object, count: int, dimensions: int | None) -> list[dict[str, object]]:
    if not isinstance(data, list) or len(cast(list[object], data)) != count:
        raise lie("sent another number of vectors than was asked for")
    rows: list[dict[str, object]] = []
    width = dimensions
    for index, entry in enumerate(cast(list[object], data)):
        vector = fields_of(entry, "a vector").get("embedding")
        values = cast(list[object], vector) if isinstance(vector, list) else []
        width = width or len(values)
        if not values or len(values) != width or not all(type(value) in (int, float) for value in values):
            raise lie("sent a vector that is none")
        rows.append({"object": "embedding", "index": index, "embedding": values})
    return rows
