"""GET /v1/models and /v1/models/{id}, DELETE for what may be deleted, GET /health."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.server.hosted import hosted_card
from bise.server.openapi import documented
from bise.server.problem import ApiError
from bise.server.service import Service

if TYPE_CHECKING:
    from bise.engine.model_spec import AdapterCard, ModelCard

router = APIRouter()


@router.get("/v1/models", **documented(None, "List the models.", tag="models"))
async def list_models(request: Request) -> Response:
    """List the models."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    data: list[dict[str, object]] = []
    for card in service.models.cards():
        data.append(body := await card_body(service, card))
        data += [adapter_body(body, adapter) for adapter in card.adapters]
    return JSONResponse({"object": "list", "data": [*data, *service.hosted.cards()]})


@router.get("/v1/models/{model_id:path}", **documented(None, "Describe a model.", tag="models"))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Describe a model."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    if (client := service.hosted.get(model_id)) is not None:
        return JSONResponse(hosted_card(client))
    card = service.models.card(model_id)
    body = await card_body(service, card)
    _, _, name = model_id.partition(ADAPTER_SEPARATOR)
    for adapter in card.adapters:
        if adapter.spec.name == name:
            body = adapter_body(body, adapter)
    return JSONResponse(body)


@router.delete("/v1/models/{model_id:path}", **documented(None, "Delete a tuned model.", tag="models"))
async def delete_model(request: Request, model_id: str) -> Response:
    """Refuse to delete a base model."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    card = service.models.card(model_id)
    raise ApiError(
        403,
        f"{card.spec.name} is a base model and cannot be deleted over the API",
        code="permission_denied",
        param="model_id",
    )


@router.get("/health", **documented(None, "Tell whether requests are taken.", tag="operation"))
async def health(request: Request) -> Response:
    """Tell whether requests are taken, and how many run and wait; a dead engine is replaced."""
    service: Service = request.app.state.service
    running = waiting = 0
    dead: list[str] = []
    for name, loaded in service.engines().items():
        stats = loaded.engine.stats()
        running += stats.num_running
        waiting += stats.num_waiting
        if loaded.engine.failure is not None:
            dead.append(name)
            service.start_recovery(name)
    status = "stopping" if service.is_draining else "engine_failed" if dead else "ok"
    body: dict[str, object] = {
        "status": status,
        "running": running,
        "waiting": waiting,
        "requests": len(service.jobs),
    }
    if dead:
        body["failed_models"] = dead
    headers = {} if status == "ok" else {"retry-after": "5"}
    return JSONResponse(body, 200 if status == "ok" else 503, headers=headers)


def adapter_body(base: dict[str, object], adapter: AdapterCard) -> dict[str, object]:
    """Return an adapter as both clients read it; `base` is its model's body."""
    body: dict[str, object] = {
        **base,
        "id": f"{base['id']}{ADAPTER_SEPARATOR}{adapter.spec.name}",
        "type": "fine-tuned",
        "job": adapter.spec.name,  # Mistral's client needs one; adapters here come from files
        "archived": False,
        "name": adapter.spec.name,
        "aliases": [],
        "state": base["state"] if adapter.is_loaded else "cold",
    }
    if adapter.fault is not None:
        body["unavailable"] = True
    return body


async def card_body(service: Service, card: ModelCard) -> dict[str, object]:
    """Return a model as both clients read it."""
    plan, spec = card.plan, card.spec
    traits = await service.traits(card)
    body: dict[str, object] = {
        "id": spec.name,
        "object": "model",
        "created": int(plan.modified_s) if plan else int(service.started_s),
        "owned_by": "bise",
        "root": spec.name,
        "type": "base",
        "name": (plan.title if plan else "") or spec.name,
        "description": None,
        "capabilities": {
            "completion_chat": bool(traits and traits.chat),
            "function_calling": bool(traits and traits.tools),
            "reasoning": bool(traits and traits.thinks),
            "completion_fim": bool(traits and traits.fim),
            "fine_tuning": False,
            "vision": False,
            "ocr": False,
            "classification": False,
            "moderation": False,
            "audio": False,
            "audio_transcription": False,
            "audio_speech": False,
        },
        "aliases": list(spec.aliases),
        "deprecation": None,
        "default_model_temperature": plan.temperature if plan else None,
        "state": card.state,
    }
    if plan:
        body |= {
            "max_context_length": plan.context,
            "max_model_len": plan.context,
            "family": plan.family,
            "parameters": plan.parameters,
            "licence": plan.licence,
        }
    if card.fault is not None:
        body["unavailable"] = True
    return body
