"""POST /v1/embeddings: the final hidden states as unit vectors, in every form that clients ask for."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.engine.request import Request as EngineRequest
from bise.engine.request import SamplingParams
from bise.errors import ContextOverflowError, RequestError
from bise.server.body import read_json
from bise.server.hosted_embeddings import embed_elsewhere
from bise.server.limits import MAX_SEQUENCES
from bise.server.openapi import documented
from bise.server.prompts import prompts_of
from bise.server.service import Job, Service
from bise.server.text_schema import EmbeddingRequest

router = APIRouter()

Vectors = npt.NDArray[np.float32]


@router.post("/v1/embeddings", **documented(EmbeddingRequest, "Turn texts into vectors."))
async def create_embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    service: Service = request.app.state.service
    body = await read_json(request, EmbeddingRequest)
    if (client := service.hosted.get(body.model)) is not None:
        return await embed_elsewhere(service, request, client, body)
    job = await service.open(request, model=body.model)
    try:
        requests = await job.plan(_plan, body)
        await job.start(requests, prompts=range(len(requests)))
        answers = await job.collect()
        generation = job.generation
        assert generation is not None
        usage = generation.usage()
        tokens = usage.prompt_tokens if usage else 0

        def made() -> dict[str, object]:
            rows = _encoded([answer.embedding for answer in answers], body)
            return {
                "id": f"embd-{secrets.token_hex(12)}",
                "object": "list",
                "model": job.model,
                "data": [
                    {"object": "embedding", "index": index, "embedding": row}
                    for index, row in enumerate(rows)
                ],
                "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
            }

        response = await job.render(made)
        await job.finish("stop")
        return response
    except BaseException as error:
        if isinstance(error, ContextOverflowError):
            error.field = "input"  # the only thing here that can be too long
        await job.finish(None, error)
        raise


def _plan(job: Job, body: EmbeddingRequest) -> list[EngineRequest]:
    if body.input in ("", [""]):
        raise RequestError("input is empty", field="input")
    prompts = prompts_of(job, body.input, "input")
    if len(prompts) > MAX_SEQUENCES:
        raise RequestError(
            f"input has {len(prompts)} texts; at most {MAX_SEQUENCES} go in one request", field="input"
        )
    job.ticket.check_input([prompt.text for prompt in prompts])
    params = SamplingParams(max_tokens=0)
    pooling = body.pooling or "mean"
    return [EngineRequest(token_ids=prompt.token_ids, params=params, pooling=pooling) for prompt in prompts]


def _encoded(
    vectors: Sequence[Sequence[float]], body: EmbeddingRequest
) -> list[list[float] | list[int] | str]:
    """Return the vectors in the form asked for. Raises RequestError for more dimensions than there are."""
    table = np.asarray(vectors, np.float32)
    wanted = body.dimensions or body.output_dimension
    if wanted is not None:
        if wanted > table.shape[1]:
            raise RequestError(
                f"dimensions is {wanted}; the model's vectors have {table.shape[1]}", field="dimensions"
            )
        table = table[:, :wanted]
        # A zero vector stays one: it has no direction to keep.
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    kind = body.output_dtype or "float"
    if kind in ("binary", "ubinary") and table.shape[1] % 8:
        raise RequestError(
            f"output_dtype {kind} packs 8 dimensions into a byte; {table.shape[1]} is no multiple of 8",
            field="output_dtype",
        )
    return [_row(row, kind, base64_wanted=body.encoding_format == "base64") for row in table]


def _row(row: Vectors, kind: str, *, base64_wanted: bool) -> list[float] | list[int] | str:
    values = {
        "float": lambda: row.astype("<f4"),
        "int8": lambda: np.rint(row * 127).astype(np.int8),
        "uint8": lambda: (np.rint(row * 127) + 128).astype(np.uint8),
        "ubinary": lambda: np.packbits(row > 0),
        "binary": lambda: (np.packbits(row > 0).astype(np.int16) - 128).astype(np.int8),
    }[kind]()
    if base64_wanted:
        return base64.b64encode(values.tobytes()).decode()
    return values.tolist()
