"""Batch jobs in Mistral's form (/v1/batch/jobs) and in OpenAI's (/v1/batches): two dialects, one engine."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.errors import RequestError
from bise.server.access import Caller
from bise.server.body import WireModel, read_json
from bise.server.files_routes import list_body
from bise.server.gate import StoreGate
from bise.server.openapi import documented
from bise.server.stored import choice_argument, enter, only_arguments, page_arguments, text_argument
from bise.store.batch_lines import MAX_CUSTOM_ID
from bise.store.batches import Batch, check_details

router = APIRouter()

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/fim/completions",
    "/v1/embeddings",
    "/v1/responses",
)
"""What a batch's requests can be sent to."""
MAX_INLINE = 10_000
_MISTRAL = {
    "queued": "QUEUED",
    "running": "RUNNING",
    "cancelling": "CANCELLATION_REQUESTED",
    "succeeded": "SUCCESS",
    "failed": "FAILED",
    "expired": "TIMEOUT_EXCEEDED",
    "cancelled": "CANCELLED",
}
_OPENAI = {"queued": "validating", "running": "in_progress", "succeeded": "completed"}
"""Where OpenAI's name differs from ours."""
_ORDERS = ("created", "-created")
_JOB_ARGUMENTS = (
    "page", "page_size", "limit", "model", "agent_id", "created_after", "created_by_me", "status", "order_by",
)  # fmt: skip


class InlineRequest(WireModel):
    """One request of a job that brings its requests along."""

    custom_id: str | None = Field(None, max_length=MAX_CUSTOM_ID)
    body: dict[str, Any]


class JobRequest(WireModel):
    """POST /v1/batch/jobs."""

    endpoint: str
    input_files: list[str] | None = Field(None, max_length=100)
    requests: list[InlineRequest] | None = Field(None, max_length=MAX_INLINE)
    model: str | None = Field(None, min_length=1, max_length=512)
    agent_id: str | None = None
    metadata: dict[str, Any] | None = None
    timeout_hours: int | None = Field(None, ge=1, le=168)


class ExpiresAfter(WireModel):
    """When the output files go."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=366 * 86_400)


class BatchRequest(WireModel):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, Any] | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/v1/batch/jobs", **documented(JobRequest, "Queue a job (Mistral).", tag="batch"))
async def create_job(request: Request) -> Response:
    """Queue a job in Mistral's form."""
    gate, caller = await enter(request, "inference")
    body = await read_json(request, JobRequest)
    _check_endpoint(body.endpoint)
    if body.agent_id is not None:
        raise RequestError("agents are not part of this server", field="agent_id")
    if bool(body.input_files) == bool(body.requests):
        raise RequestError("give either input_files or requests", field="input_files")
    _check_ids(body.requests or [])
    files = body.input_files or [await _store_inline(gate, caller, body.requests or [])]
    batch = await _create(
        gate,
        caller,
        endpoint=body.endpoint,
        input_files=files,
        model=body.model,
        timeout_s=3600.0 * (body.timeout_hours or 24),
        details=body.metadata or {},
    )
    return JSONResponse(job_body(batch))


@router.get("/v1/batch/jobs", **documented(None, "List your jobs (Mistral).", tag="batch"))
async def list_jobs(request: Request) -> Response:
    """List the caller's jobs in Mistral's form."""
    gate, caller = await enter(request, "inference")
    offset, limit = page_arguments(request)
    if text_argument(request, "agent_id") is not None:
        raise RequestError("agents are not part of this server", field="agent_id")
    wanted = request.query_params.getlist("status")
    names = {mistral: ours for ours, mistral in _MISTRAL.items()}
    if any(status not in names for status in wanted):
        raise RequestError(f"status must be one of {', '.join(names)}", field="status")
    batches, total = await gate.offload(
        gate.store.batches.list,
        caller.owner,
        statuses=[names[status] for status in wanted],
        model=text_argument(request, "model", 512),
        created_after=_moment(text_argument(request, "created_after")),
        key_id=caller.key_id if _truth(request, "created_by_me") else None,
        # Mistral's client writes the pairs of its `metadata` filter among the other arguments.
        details={name: value for name, value in request.query_params.items() if name not in _JOB_ARGUMENTS},
        offset=offset,
        limit=limit,
        newest_first=choice_argument(request, "order_by", _ORDERS) != "created",
    )
    return JSONResponse({"object": "list", "total": total, "data": [job_body(batch) for batch in batches]})


@router.get("/v1/batch/jobs/{job_id}", **documented(None, "Describe a job (Mistral).", tag="batch"))
async def get_job(request: Request, job_id: str) -> Response:
    """Describe a job in Mistral's form; with `inline=true` its answers come along."""
    gate, caller = await enter(request, "inference")
    batch = await gate.offload(gate.store.batches.get, caller.owner, job_id)
    body = job_body(batch)
    if _truth(request, "inline"):
        body["outputs"] = await gate.offload(gate.store.batches.output_lines, caller.owner, job_id)
    return JSONResponse(body)


@router.delete("/v1/batch/jobs/{job_id}", **documented(None, "Delete a job (Mistral).", tag="batch"))
async def delete_job(request: Request, job_id: str) -> Response:
    """Delete a job that is over."""
    gate, caller = await enter(request, "inference")
    await gate.offload(gate.store.batches.delete, caller.owner, job_id)
    return JSONResponse({"id": job_id, "object": "batch", "deleted": True})


@router.post("/v1/batch/jobs/{job_id}/cancel", **documented(None, "Cancel a job (Mistral).", tag="batch"))
async def cancel_job(request: Request, job_id: str) -> Response:
    """Cancel a job in Mistral's form."""
    gate, caller = await enter(request, "inference")
    return JSONResponse(job_body(await gate.offload(gate.store.batches.cancel, caller.owner, job_id)))


@router.post("/v1/batches", **documented(BatchRequest, "Queue a job (OpenAI).", tag="batch"))
async def create_batch(request: Request) -> Response:
    """Queue a job in OpenAI's form."""
    gate, caller = await enter(request, "inference")
    body = await read_json(request, BatchRequest)
    _check_endpoint(body.endpoint)
    if body.output_expires_after is not None:
        raise RequestError("output files do not expire here; delete them", field="output_expires_after")
    batch = await _create(
        gate,
        caller,
        endpoint=body.endpoint,
        input_files=[body.input_file_id],
        window=body.completion_window,
        details=body.metadata or {},
    )
    return JSONResponse(batch_body(batch))


@router.get("/v1/batches", **documented(None, "List your jobs (OpenAI).", tag="batch"))
async def list_batches(request: Request) -> Response:
    """List the caller's jobs in OpenAI's form."""
    gate, caller = await enter(request, "inference")
    only_arguments(request, "after", "limit")
    offset, limit = page_arguments(request)
    after = text_argument(request, "after")
    batches, total = await gate.offload(
        gate.store.batches.list, caller.owner, after=after, offset=offset, limit=limit + 1
    )
    data = [batch_body(batch) for batch in batches[:limit]]
    return JSONResponse(list_body(data, total, has_more=len(batches) > limit))


@router.get("/v1/batches/{batch_id}", **documented(None, "Describe a job (OpenAI).", tag="batch"))
async def get_batch(request: Request, batch_id: str) -> Response:
    """Describe a job in OpenAI's form."""
    gate, caller = await enter(request, "inference")
    return JSONResponse(batch_body(await gate.offload(gate.store.batches.get, caller.owner, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel", **documented(None, "Cancel a job (OpenAI).", tag="batch"))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Cancel a job in OpenAI's form."""
    gate, caller = await enter(request, "inference")
    return JSONResponse(batch_body(await gate.offload(gate.store.batches.cancel, caller.owner, batch_id)))


def job_body(batch: Batch) -> dict[str, Any]:
    """Return a job as Mistral's client reads it: `completed` is succeeded and failed together."""
    return {
        "id": batch.id,
        "object": "batch",
        "input_files": batch.input_files,
        "metadata": batch.details,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "agent_id": None,
        "output_file": batch.output_file,
        "error_file": batch.error_file,
        "errors": [{"message": _fault_text(fault), "count": 1} for fault in batch.errors],
        "outputs": None,
        "status": _MISTRAL[batch.status],
        "created_at": int(batch.created_at),
        "total_requests": batch.total,
        "completed_requests": batch.succeeded + batch.failed,
        "succeeded_requests": batch.succeeded,
        "failed_requests": batch.failed,
        "started_at": _seconds(batch.started_at),
        "completed_at": _seconds(batch.finished_at),
    }


def batch_body(batch: Batch) -> dict[str, Any]:
    """Return a job as OpenAI's client reads it: `completed` counts what succeeded."""
    ended = {
        status: _seconds(batch.finished_at) if batch.status == status else None
        for status in ("succeeded", "failed", "expired", "cancelled")
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_files[0],
        "completion_window": batch.window or "24h",
        "status": _OPENAI.get(batch.status, batch.status),
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": int(batch.created_at),
        "in_progress_at": _seconds(batch.started_at),
        "expires_at": int(batch.expires_at),
        "finalizing_at": ended["succeeded"],
        "completed_at": ended["succeeded"],
        "failed_at": ended["failed"],
        "expired_at": ended["expired"],
        "cancelling_at": _seconds(batch.cancelled_at),
        "cancelled_at": ended["cancelled"],
        "request_counts": {"total": batch.total, "completed": batch.succeeded, "failed": batch.failed},
        "metadata": batch.details or None,
    }


async def _create(gate: StoreGate, caller: Caller, *, details: dict[str, Any], **fields: Any) -> Batch:
    check_details(details)
    batch = await gate.offload(
        gate.store.batches.create, caller.owner, key_id=caller.key_id, details=details, **fields
    )
    gate.wake_worker()
    return batch


async def _store_inline(gate: StoreGate, caller: Caller, requests: list[InlineRequest]) -> str:
    """Keep a job's inline requests as a file, so that all jobs are worked off the same way."""
    lines = (
        json.dumps({"custom_id": entry.custom_id, "body": entry.body}).encode() + b"\n" for entry in requests
    )
    file = await gate.offload(gate.store.files.create, caller.owner, "inline_requests.jsonl", "batch", lines)
    return file.id


def _check_ids(requests: list[InlineRequest]) -> None:
    seen: set[str] = set()
    for index, entry in enumerate(requests):
        if entry.custom_id in seen:
            raise RequestError(
                f"requests[{index}].custom_id is given twice: {entry.custom_id[:64]!r}", field="requests"
            )
        if entry.custom_id is not None:
            seen.add(entry.custom_id)


def _check_endpoint(endpoint: str) -> None:
    if endpoint not in ENDPOINTS:
        raise RequestError(f"endpoint must be one of {', '.join(ENDPOINTS)}", field="endpoint")


def _fault_text(fault: dict[str, Any]) -> str:
    return f"line {fault['line']}: {fault['message']}"


def _moment(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text.replace(" ", "+")).timestamp()
    except (ValueError, OverflowError):
        raise RequestError(
            "created_after must be a date and time in ISO 8601", field="created_after"
        ) from None


def _truth(request: Request, name: str) -> bool:
    return choice_argument(request, name, ("true", "false", "True", "False")) in ("true", "True")


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)
