"""GET /v1/models and /v1/models/{id}, DELETE for what may be deleted, GET /health."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.server.fine_tuning import remove_tuned
from bise.server.gate import StoreGate
from bise.server.hosted import hosted_card
from bise.server.openapi import documented
from bise.server.problem import ApiError
from bise.server.service import Service

if TYPE_CHECKING:
    from bise.engine.model_spec import AdapterCard, ModelCard

router = APIRouter()


@router.get("/v1/models", **documented(None, "List the models.", tag="models"))
async def list_models(request: Request) -> Response:
    """List the models; `provider` narrows to an owner, `model` to a name or alias."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    hidden = await service.tuned.hidden_from(request, service.gate)
    data: list[dict[str, object]] = []
    for card in service.models.cards():
        data.append(body := await card_body(service, card))
        tuned = [adapter_body(service, body, adapter) for adapter in card.adapters]
        data += [entry for entry in tuned if entry["id"] not in hidden]
    provider, model = request.query_params.get("provider"), request.query_params.get("model")
    shown = [
        card
        for card in (*data, *service.hosted.cards())
        if provider in (None, card["owned_by"])
        and (model is None or model == card["id"] or model in cast(list[str], card["aliases"]))
    ]
    return JSONResponse({"object": "list", "data": shown})


@router.get("/v1/models/{model_id:path}", **documented(None, "Describe a model.", tag="models"))
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Describe a model."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    if (client := service.hosted.get(model_id)) is not None:
        return JSONResponse(hosted_card(client))
    card = service.models.card(model_id)
    await service.tuned.require(request, service.gate, card.spec.name, model_id)
    body = await card_body(service, card)
    _, _, name = model_id.partition(ADAPTER_SEPARATOR)
    for adapter in card.adapters:
        if adapter.spec.name == name:
            body = adapter_body(service, body, adapter)
    return JSONResponse(body)


@router.delete("/v1/models/{model_id:path}", **documented(None, "Delete a tuned model.", tag="models"))
async def delete_model(request: Request, model_id: str) -> Response:
    """Remove a model that a job of the caller's made; refuse to delete any other."""
    service: Service = request.app.state.service
    await service.gate.authenticate(request)
    card = service.models.card(model_id)
    await service.tuned.require(request, service.gate, card.spec.name, model_id)
    adapter = model_id.partition(ADAPTER_SEPARATOR)[2]
    if service.tuned.get(f"{card.spec.name}{ADAPTER_SEPARATOR}{adapter}") is not None:
        return await remove_tuned(request, card.spec.name, adapter)
    way_out = "; an admin unloads it with DELETE /v1/admin/adapters/MODEL:NAME" if adapter else ""
    raise ApiError(
        403,
        f"{model_id[:200]} is not yours to delete over the API: no job of yours made it{way_out}",
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


def adapter_body(service: Service, base: dict[str, object], adapter: AdapterCard) -> dict[str, object]:
    """Return an adapter as both clients read it; `base` is its model's body."""
    name = f"{base['id']}{ADAPTER_SEPARATOR}{adapter.spec.name}"
    made = service.tuned.get(name)
    body: dict[str, object] = {
        **base,
        "id": name,
        "type": "fine-tuned",
        # Mistral's client needs a job; an adapter that came from files has none but its name.
        "job": adapter.spec.name if made is None else made.job_id,
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
            "fine_tuning": isinstance(service.gate, StoreGate) and find_spec("torch") is not None,
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
