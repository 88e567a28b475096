"""/v1/admin/adapters: LoRA adapters from directories of this machine, loaded and unloaded live."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.errors import ConflictError, ModelBusyError, ModelFileError, RequestError
from bise.server.body import WireModel, read_json
from bise.server.openapi import documented
from bise.server.problem import ApiError
from bise.server.stored import enter
from bise.server.tuning_schema import checked_name

if TYPE_CHECKING:
    from bise.engine.model_spec import AdapterCard, ModelCard
    from bise.server.service import Service

logger = logging.getLogger(__name__)

router = APIRouter()


class NewAdapter(WireModel):
    """POST /v1/admin/adapters."""

    model: str = Field(min_length=1, max_length=512)
    name: str
    path: str = Field(min_length=1, max_length=4096)
    """Absolute path of a directory on the server's machine."""


@router.get("/v1/admin/adapters", **documented(None, "List adapters.", tag="admin"))
async def list_adapters(request: Request) -> Response:
    """List the adapters of every model, wherever they come from."""
    await enter(request, "admin")
    service: Service = request.app.state.service
    data = [_body(service, card, adapter) for card in service.models.cards() for adapter in card.adapters]
    return JSONResponse({"object": "list", "data": data})


@router.post("/v1/admin/adapters", **documented(NewAdapter, "Load an adapter.", tag="admin"))
async def load_adapter(request: Request) -> Response:
    """Load the adapter in a directory, its model first if need be, and serve it as MODEL:NAME to everyone."""
    gate, _ = await enter(request, "admin")
    service: Service = request.app.state.service
    body = await read_json(request, NewAdapter)
    service.hosted.refuse(body.model)
    name, path = checked_name("name", body.name), Path(body.path)
    if not path.is_absolute():
        raise RequestError("path must be absolute: it is of the server's machine", field="path")
    if ADAPTER_SEPARATOR in body.model:
        raise RequestError("model must be a model, not one of its adapters", field="model")
    model = service.models.card(body.model).spec.name
    if await gate.offload(gate.store.tuning.has_name, model, name):
        raise ConflictError(
            f"{model}:{name} is the name of a fine-tuning job's result; take another", field="name"
        )
    try:
        await asyncio.to_thread(service.models.add_adapter, model, name, path, at_once=True)
    except ModelFileError as error:
        if service.models.card(model).plan is None:
            raise  # its model is what is damaged
        raise RequestError(f"path: {error}", field="path") from None
    logger.info("event=adapter_loaded model=%s name=%s", ascii(model), name)
    card = service.models.card(model)
    return JSONResponse(_body(service, card, next(own for own in card.adapters if own.spec.name == name)))


@router.delete("/v1/admin/adapters/{adapter:path}", **documented(None, "Unload an adapter.", tag="admin"))
async def unload_adapter(request: Request, adapter: str) -> Response:
    """Refuse MODEL:NAME from now on and give its memory back; 409 while a request uses it."""
    await enter(request, "admin")
    service: Service = request.app.state.service
    model, name = service.models.card(adapter).spec.name, adapter.partition(ADAPTER_SEPARATOR)[2]
    full_name = f"{model}{ADAPTER_SEPARATOR}{name}"
    if service.tuned.get(full_name) is not None:
        raise ConflictError(
            f"{full_name} was made by a fine-tuning job; DELETE /v1/models/{full_name} removes it",
            field="adapter",
        )
    try:
        await asyncio.to_thread(service.models.remove_adapter, model, name)
    except ModelBusyError as error:
        raise ApiError(
            409, str(error), code="conflict", param="adapter", headers={"retry-after": "1"}
        ) from None
    logger.info("event=adapter_unloaded model=%s name=%s", ascii(model), ascii(name))
    return JSONResponse({"id": full_name, "object": "adapter", "deleted": True})


def _body(service: Service, model: ModelCard, adapter: AdapterCard) -> dict[str, object]:
    """Return what an admin may know of an adapter."""
    full_name = f"{model.spec.name}{ADAPTER_SEPARATOR}{adapter.spec.name}"
    made = service.tuned.get(full_name)
    return {
        "id": full_name,
        "object": "adapter",
        "model": model.spec.name,
        "name": adapter.spec.name,
        "path": str(adapter.spec.path),
        "state": "ready" if adapter.is_loaded else "cold",
        "users": adapter.users,
        "size_bytes": adapter.size_bytes,
        "job": None if made is None else made.job_id,
        "fault": adapter.fault,
    }
