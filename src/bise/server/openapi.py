"""The OpenAPI page: what routes say of themselves, gathered into one document."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bise import __version__

_REF = "#/components/schemas/{model}"
_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ErrorDetail):
    """Every refusal: Mistral's flat form and OpenAI's nested one in one object."""

    object: str
    error: ErrorDetail


def documented(
    body: type[BaseModel] | None,
    summary: str,
    *,
    answer: type[BaseModel] | None = None,
    streams: bool = False,
    tag: str = "inference",
) -> dict[str, Any]:
    """Return the keyword arguments that describe a route to FastAPI."""
    models = [f"{model.__module__}:{model.__name__}" for model in (body, answer, ErrorBody) if model]
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer) if answer else {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": content}}
    for status in _ERRORS:
        responses[status] = {
            "description": "Refused",
            "content": {"application/json": {"schema": _ref(ErrorBody)}},
        }
    extra: dict[str, Any] = {"responses": responses, "x-models": models}
    if body is not None:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        }
    return {"summary": summary, "tags": [tag], "openapi_extra": extra, "response_model": None}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of an application."""
    from fastapi.openapi.utils import get_openapi

    document = get_openapi(
        title="bise",
        version=__version__,
        description="Mistral's and OpenAI's APIs on one self-hosted server.",
        routes=app.routes,
    )
    models: dict[str, type[BaseModel]] = {}
    for path in document["paths"].values():
        for operation in path.values():
            for name in operation.pop("x-models", ()):
                model = resolve_name(name)
                models[model.__name__] = model
            operation.get("responses", {}).pop("422", None)
    _, schemas = models_json_schema([(model, "validation") for model in models.values()], ref_template=_REF)
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | schemas.get("$defs", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    return document
