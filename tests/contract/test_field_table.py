"""docs/fields.md: complete against schema and clients, and every row true of a live server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mistralai.client import models as mistral
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from bise.server.anthropic_schema import MessagesRequest
from bise.server.chat_schema import ChatRequest
from bise.server.responses_schema import ResponsesRequest
from bise.server.text_schema import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    FimRequest,
    TokenizeRequest,
)

PAGE = Path(__file__).parents[2] / "docs" / "fields.md"
ASK = [{"role": "user", "content": "Hi"}]
ROUTES = {
    "/v1/chat/completions": (ChatRequest, {"messages": ASK}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hi"}),
    "/v1/fim/completions": (FimRequest, {"prompt": "Hi"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "Hi"}),
    "/v1/responses": (ResponsesRequest, {"input": "Hi"}),
    "/v1/messages": (MessagesRequest, {"messages": ASK, "max_tokens": 5}),
    "/v1/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/v1/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}


def _typed(params) -> set[str]:
    return set(params.__annotations__) | {"stream"}


def of_clients(route: str) -> set[str]:
    """Return the fields of a route that the clients' own types have."""
    if route == "/v1/messages":
        from anthropic.types import (
            message_create_params,
        )  # a second to import, and every worker collects this

        return _typed(message_create_params.MessageCreateParamsBase)
    return {
        "/v1/chat/completions": _typed(chat_create_params.CompletionCreateParamsBase)
        | set(mistral.ChatCompletionRequest.model_fields),
        "/v1/completions": _typed(completion_create_params.CompletionCreateParamsBase),
        "/v1/fim/completions": set(mistral.FIMCompletionRequest.model_fields),
        "/v1/embeddings": set(embedding_create_params.EmbeddingCreateParams.__annotations__)
        | {field.alias or name for name, field in mistral.EmbeddingRequest.model_fields.items()},
        "/v1/responses": _typed(response_create_params.ResponseCreateParamsBase)
        | set(mistral.CreateResponseRequest.model_fields),
    }.get(route, set())


def rows() -> list[tuple[str, str, str, str]]:
    """Return (route, field, what, example) of every row of the page."""
    found, route = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## POST "):
            route = line.removeprefix("## POST ")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if route and line.startswith("| ") and cells[0] not in ("field", "---"):
            found.append((route, cells[0], cells[1], cells[2].strip("`")))
    return found


ROWS = rows()


@pytest.mark.parametrize("route", ROUTES)
def test_the_page_has_every_field_of_the_schema_and_of_the_clients_and_no_other(route):
    shown = {re.split(r"[.\[ ]", field)[0] for where, field, _, _ in ROWS if where == route} - {"fields"}
    assert shown == set(ROUTES[route][0].model_fields)
    assert of_clients(route) <= shown


@pytest.mark.parametrize(("route", "field", "what", "example"), ROWS, ids=lambda value: str(value)[:40])
def test_every_row_of_the_page_is_true(live, route, field, what, example):
    live.engine.text = "Hi"
    wanted = json.loads("{" + example + "}")
    answer = live.post(route, {"model": "stub", **ROUTES[route][1], **wanted})
    if what == "refused":
        assert answer.status_code in (400, 404), answer.text
        named = field.split(" ")[0].split(".")[-1].split("]")[-1].lstrip(".")
        assert named in answer.text or next(iter(wanted)) in answer.json()["error"]["message"]
    else:
        assert what in ("supported", "accepted")
        assert answer.status_code == 200, answer.text
        assert b"error" not in answer.content[:20]


def test_the_page_covers_every_route_that_computes():
    assert {route for route, _, _, _ in ROWS} == set(ROUTES)
