"""/v1/fine_tuning/jobs for OpenAI's client and for Mistral's older one: the same jobs in two dialects."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.errors import ModelNotFoundError, RequestError
from bise.server.body import read_json
from bise.server.openapi import documented
from bise.server.problem import ApiError
from bise.server.stored import choice_argument, enter, page_arguments, text_argument, whole_argument
from bise.server.tuning_schema import (
    MistralJob,
    OpenAiJob,
    event_number,
    mistral_body,
    mistral_checkpoint,
    mistral_event,
    mistral_spec,
    openai_body,
    openai_checkpoint,
    openai_event,
    openai_spec,
)

if TYPE_CHECKING:
    from bise.server.access import Caller
    from bise.server.gate import StoreGate
    from bise.server.service import Service
    from bise.store.tuning import TuningEvent, TuningJob

router = APIRouter()

PURPOSE = "fine-tune"
_TOLD = ("message", "metrics", "checkpoint")
"""Kinds of events that `/events` lists and streams."""
_POLL_S = 0.5
_MAX_CHECKPOINTS = 10_000
"""More than any job has: there is one an epoch."""
_FILTERS = {
    "QUEUED": ("waiting", "queued", "paused"), "RUNNING": ("running", "pausing"), "FAILED": ("failed",),
    "SUCCESS": ("succeeded",), "CANCELLED": ("cancelled",), "CANCELLATION_REQUESTED": ("cancelling",),
    "STARTED": (), "VALIDATING": (), "VALIDATED": (), "FAILED_VALIDATION": (),
}  # fmt: skip
"""Our statuses for each that Mistral's list can be asked for."""


@router.post(
    "/v1/fine_tuning/jobs",
    **documented(OpenAiJob, "Queue a job (OpenAI; Mistral's form too).", tag="fine-tuning"),
)
async def create(request: Request) -> Response:
    """Queue a job in either form: `training_files` is Mistral's, `training_file` OpenAI's."""
    gate, caller = await enter(request, "tune")
    service: Service = request.app.state.service
    if find_spec("torch") is None:
        raise ApiError(
            501,
            "fine-tuning needs PyTorch, which is not installed on this server: its operator can pip install "
            "'bise[torch]' and restart it",
            code="not_implemented",
            headers={"x-should-retry": "false"},
        )
    is_mistral = await _is_mistral_job(request)
    if is_mistral:
        if choice_argument(request, "dry_run", ("true", "false")) == "true":
            raise RequestError("dry_run is not supported: `bise tune check` estimates time", field="dry_run")
        body = await read_json(request, MistralJob)
        spec = mistral_spec(body)
    else:
        body = await read_json(request, OpenAiJob)
        spec = openai_spec(body)
    name = _base(service, body.model)
    await gate.check_training(caller, name)
    for file_id in (*spec["training_files"], *spec["validation_files"]):
        file = await gate.offload(gate.store.files.get, caller.owner, file_id)
        if file.purpose != PURPOSE:
            raise RequestError(
                f"file {file.id} was not uploaded with purpose {PURPOSE}", field="training_file"
            )
    taken = {adapter.spec.name for adapter in service.models.card(name).adapters}
    wanted = spec["suffix"]
    if wanted in taken:
        raise RequestError(f"suffix: {name}:{wanted} is there already; take another name", field="suffix")
    job = await gate.offload(
        gate.store.tuning.create,
        caller.owner,
        model=name,
        name=wanted,
        form="mistral" if is_mistral else "openai",
        spec=spec | {"key_id": caller.key_id},
        is_waiting=not spec["auto_start"],
    )
    service.tuned.wake()
    return JSONResponse(await _body(request, gate, job))


@router.get("/v1/fine_tuning/jobs", **documented(None, "List your jobs.", tag="fine-tuning"))
async def list_jobs(request: Request) -> Response:
    """List the caller's jobs, newest first."""
    gate, caller = await enter(request)
    offset, limit = page_arguments(request)
    filters: dict[str, Any] = {}
    if (model := text_argument(request, "model", 512)) is not None:
        filters["model"] = model
    if (suffix := text_argument(request, "suffix", 64)) is not None:
        filters["adapter"] = suffix
    if (status := choice_argument(request, "status", tuple(_FILTERS))) is not None:
        filters["status"] = list(_FILTERS[status])
    for name in ("wandb_project", "wandb_name"):
        if text_argument(request, name) is not None:
            raise RequestError(f"{name}: integrations are not part of this server", field=name)
    jobs, total = await gate.offload(
        gate.store.tuning.list,
        caller.owner,
        after=text_argument(request, "after"),
        offset=offset,
        limit=limit + 1,
        filters=filters,
        created_after=_moment(request, "created_after"),
        created_before=_moment(request, "created_before"),
    )
    page = jobs[:limit]
    if _speaks_mistral(request):
        return JSONResponse({"object": "list", "total": total, "data": [mistral_body(job) for job in page]})
    data = [openai_body(job) for job in page]
    return JSONResponse({"object": "list", "data": data, "has_more": len(jobs) > limit})


@router.get("/v1/fine_tuning/jobs/{job_id}", **documented(None, "Describe a job.", tag="fine-tuning"))
async def retrieve(request: Request, job_id: str) -> Response:
    """Describe a job."""
    gate, caller = await enter(request)
    return JSONResponse(
        await _body(request, gate, await gate.offload(gate.store.tuning.get, caller.owner, job_id))
    )


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", **documented(None, "Cancel a job.", tag="fine-tuning"))
async def cancel(request: Request, job_id: str) -> Response:
    """Cancel a job; what it learned so far is removed."""
    return await _change(request, job_id, "cancel")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", **documented(None, "Pause a job.", tag="fine-tuning"))
async def pause(request: Request, job_id: str) -> Response:
    """Stop a job behind a checkpoint."""
    return await _change(request, job_id, "pause")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", **documented(None, "Resume a job.", tag="fine-tuning"))
async def resume(request: Request, job_id: str) -> Response:
    """Let a paused job go on from its checkpoint."""
    return await _change(request, job_id, "resume")


@router.post(
    "/v1/fine_tuning/jobs/{job_id}/start", **documented(None, "Start a job (Mistral).", tag="fine-tuning")
)
async def start(request: Request, job_id: str) -> Response:
    """Start a job that was made with auto_start false."""
    return await _change(request, job_id, "start")


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/events", **documented(None, "List a job's events.", tag="fine-tuning")
)
async def list_events(request: Request, job_id: str) -> Response:
    """List a job's events, newest first; with `stream=true` send them as they come, oldest first."""
    gate, caller = await enter(request)
    if choice_argument(request, "stream", ("true", "false")) == "true":
        await gate.offload(gate.store.tuning.get, caller.owner, job_id)
        return StreamingResponse(_stream(request, gate, caller, job_id), media_type="text/event-stream")
    limit = whole_argument(request, "limit", 20, 1, 1000)
    events = await _events(request, gate, caller, job_id, _TOLD, limit + 1)
    data = [openai_event(event) for event in events[:limit]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(events) > limit})


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/checkpoints",
    **documented(None, "List a job's checkpoints.", tag="fine-tuning"),
)
async def list_checkpoints(request: Request, job_id: str) -> Response:
    """List a job's checkpoints, one an epoch, newest first: while it runs all so far, then those that are
    kept as models.
    """
    gate, caller = await enter(request)
    job = await gate.offload(gate.store.tuning.get, caller.owner, job_id)
    limit = whole_argument(request, "limit", 10, 1, 1000)
    events = await _events(request, gate, caller, job_id, ("checkpoint",), _MAX_CHECKPOINTS)
    found = [
        openai_checkpoint(job, event)
        for event in events
        if not job.is_over or event.data["step"] in job.checkpoints
    ]
    data, has_more = found[:limit], len(found) > limit
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": has_more})


async def _is_mistral_job(request: Request) -> bool:
    """Tell Mistral's form from OpenAI's by its body, before either is checked."""
    try:
        value: object = json.loads(await request.body())
    except (ValueError, RecursionError):
        return False  # read_json says what is wrong
    return isinstance(value, dict) and "training_file" not in value and "training_files" in value


def _base(service: Service, model: str) -> str:
    """Return the name of the model to train; RequestError for what is no base model on this machine."""
    if service.hosted.get(model) is not None:
        raise RequestError(f"{model} is hosted elsewhere and cannot be fine-tuned here", field="model")
    base, separator, _ = model.partition(ADAPTER_SEPARATOR)
    if separator:
        raise RequestError(f"{model} is tuned already; name its base, {base}", field="model")
    return service.models.card(model).spec.name


def _speaks_mistral(request: Request) -> bool:
    agent = request.headers.get("user-agent", "")
    return agent.startswith("mistral-client") or "page_size" in request.query_params


async def _body(request: Request, gate: StoreGate, job: TuningJob) -> dict[str, Any]:
    """Return a job in the dialect of whoever asks; to strangers in the one it was asked for in."""
    is_openai = "openai" in request.headers.get("user-agent", "").lower()
    if is_openai or (job.form == "openai" and not _speaks_mistral(request)):
        return openai_body(job)
    events = await gate.offload(
        gate.store.tuning.events, job.owner, job.id, kinds=("message", "checkpoint"), limit=1000
    )
    return mistral_body(job) | {
        "events": [mistral_event(event) for event in events if event.kind == "message"],
        "checkpoints": [mistral_checkpoint(event) for event in events if event.kind == "checkpoint"],
    }


async def _change(request: Request, job_id: str, wish: str) -> Response:
    gate, caller = await enter(request, "tune")
    service: Service = request.app.state.service
    job = await gate.offload(gate.store.tuning.change, caller.owner, job_id, wish)
    service.tuned.wake()
    return JSONResponse(await _body(request, gate, job))


async def _events(
    request: Request, gate: StoreGate, caller: Caller, job_id: str, kinds: tuple[str, ...], limit: int
) -> list[TuningEvent]:
    """Return a job's newest events of some kinds, those before `after` where the request gives one."""
    after = text_argument(request, "after")
    number = None if after is None else event_number(after, job_id)
    return await gate.offload(
        gate.store.tuning.events, caller.owner, job_id, kinds=kinds, after=number, limit=limit
    )


async def _stream(request: Request, gate: StoreGate, caller: Caller, job_id: str) -> AsyncIterator[str]:
    """Yield events as server-sent events until the job is over."""
    service: Service = request.app.state.service
    told = 0
    while not service.is_draining:
        job = await gate.offload(gate.store.tuning.get, caller.owner, job_id)
        events = await gate.offload(
            gate.store.tuning.events, caller.owner, job_id, kinds=_TOLD, limit=1_000_000
        )
        for event in reversed(events):
            if event.number > told:
                told = event.number
                yield f"data: {json.dumps(openai_event(event))}\n\n"
        if job.is_over:
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(_POLL_S)


def _moment(request: Request, name: str) -> float | None:
    text = text_argument(request, name)
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise RequestError(f"{name} must be a date and time in ISO 8601", field=name) from None


async def remove_tuned(request: Request, base: str, adapter: str) -> Response:
    """Stop serving what a job of the caller's made, and remove it from the disk: its model with all
    checkpoints, or one checkpoint.
    """
    gate, caller = await enter(request, "tune")
    service: Service = request.app.state.service
    name = f"{base}{ADAPTER_SEPARATOR}{adapter}"
    made = service.tuned.get(name)
    if made is None or not (made.owner == caller.owner or caller.is_admin):
        raise ModelNotFoundError(f"none of your jobs made {name[:200]}", field="model")
    paths = {card.spec.name: card.spec.path for card in service.models.card(base).adapters}
    gone = [adapter]
    if made.step is None:  # checkpoints first: while one of them is in use, all stays as it is
        gone = [*(own for own in paths if own.startswith(f"{adapter}@")), adapter]
    for own in gone:
        await service.offload(service.models.remove_adapter, base, own)
        service.tuned.remove(f"{base}{ADAPTER_SEPARATOR}{own}")
    await gate.offload(gate.store.tuning.forget, made.owner, made.job_id, made.step)
    path = paths[adapter] if made.step is not None else paths[adapter].parent
    if made.job_id in path.parts:
        await service.offload(shutil.rmtree, path, ignore_errors=True)
    return JSONResponse({"id": name, "object": "model", "deleted": True})
