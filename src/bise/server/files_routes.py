"""/v1/files, in a form that both Mistral's and OpenAI's clients read."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from bise.errors import AuthenticationError, RequestError
from bise.server.gate import StoreGate
from bise.server.openapi import documented
from bise.server.problem import ApiError
from bise.server.stored import (
    choice_argument,
    choice_arguments,
    enter,
    only_arguments,
    page_arguments,
    text_argument,
    whole_argument,
)
from bise.store.files import CHUNK_BYTES, OUTPUT, PURPOSES, RESULTS, SAMPLE_TYPES, StoredFile
from bise.store.secret import keyed_hash

router = APIRouter()

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096
_HOUR_S = 3600.0
_MAX_EXPIRY_S = 366 * 86_400
_SOURCES = {"upload": "upload", "mistral": "bise", "repository": "none"}
"""Mistral's names of where files come from, and ours; none come from repositories."""
_LIST_ARGUMENTS = (
    "page", "page_size", "limit", "after", "order", "purpose", "search", "sample_type", "source", "mimetypes",
    "include_total",
)  # fmt: skip


@router.post("/v1/files", **documented(None, "Upload a file (multipart).", tag="files"))
async def upload(request: Request) -> Response:
    """Store an uploaded file."""
    gate, caller = await enter(request, "inference")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(415, "a file is uploaded as multipart/form-data", code="unsupported_media_type")
    async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RequestError("the form needs a file in the field `file`", field="file")
        stored = await gate.offload(
            gate.store.files.create,
            caller.owner,
            file.filename or "",
            _text_field(form, "purpose") or "fine-tune",
            _pieces(file),
            expires_after_s=_expiry(form),
        )
    return JSONResponse(file_body(stored))


@router.get("/v1/files", **documented(None, "List your files.", tag="files"))
async def list_files(request: Request) -> Response:
    """List the caller's files."""
    gate, caller = await enter(request, "inference")
    only_arguments(request, *_LIST_ARGUMENTS)
    offset, limit = page_arguments(request)
    if request.query_params.getlist("mimetypes"):
        raise RequestError("files here have no MIME types; leave mimetypes out", field="mimetypes")
    sources = [_SOURCES.get(name, "") for name in choice_arguments(request, "source", tuple(_SOURCES))]
    files, total = await gate.offload(
        gate.store.files.list,
        caller.owner,
        purpose=choice_argument(request, "purpose", (*PURPOSES, OUTPUT, RESULTS)),
        sample_types=choice_arguments(request, "sample_type", SAMPLE_TYPES),
        sources=sources,
        search=text_argument(request, "search"),
        after=text_argument(request, "after"),
        offset=offset,
        limit=limit + 1,
        newest_first=choice_argument(request, "order", ("asc", "desc")) != "asc",
    )
    data = [file_body(file) for file in files[:limit]]
    body = list_body(data, total, has_more=len(files) > limit)
    if choice_argument(request, "include_total", ("true", "false")) == "false":
        body["total"] = None
    return JSONResponse(body)


@router.get("/v1/files/{file_id}", **documented(None, "Describe a file.", tag="files"))
async def retrieve(request: Request, file_id: str) -> Response:
    """Describe a file."""
    gate, caller = await enter(request, "inference")
    return JSONResponse(file_body(await gate.offload(gate.store.files.get, caller.owner, file_id)))


@router.delete("/v1/files/{file_id}", **documented(None, "Delete a file.", tag="files"))
async def delete(request: Request, file_id: str) -> Response:
    """Delete a file."""
    gate, caller = await enter(request, "inference")
    gone = await gate.offload(gate.store.files.delete, caller.owner, file_id)
    return JSONResponse({"id": gone.id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content", **documented(None, "Download a file.", tag="files"))
async def content(request: Request, file_id: str) -> Response:
    """Send a file's bytes, to its owner or to whoever has a signed link."""
    if "signature" in request.query_params:
        gate, owner = _signed_owner(request, file_id)
    else:
        gate, caller = await enter(request, "inference")
        owner = caller.owner
    file = await gate.offload(gate.store.files.get, owner, file_id)
    pieces = await gate.offload(gate.store.files.read, owner, file_id)
    return StreamingResponse(
        pieces,
        media_type="application/octet-stream",
        headers={
            "content-length": str(file.size_bytes),
            "content-disposition": f'attachment; filename="{file.id}"',
        },
    )


@router.get("/v1/files/{file_id}/url", **documented(None, "Make a link that needs no key.", tag="files"))
async def signed_url(request: Request, file_id: str) -> Response:
    """Return a link to a file that works without a key for `expiry` hours (24 by default)."""
    gate, caller = await enter(request, "inference")
    await gate.offload(gate.store.files.get, caller.owner, file_id)
    hours = whole_argument(request, "expiry", 24, 1, 168)
    until = int(gate.store.clock() + hours * _HOUR_S)
    signature = _signature(gate, file_id, caller.owner, until)
    query = f"owner={caller.owner.encode().hex()}&until={until}&signature={signature}"
    base = f"{request.url.scheme}://{request.headers.get('host', 'localhost')}"
    return JSONResponse({"url": f"{base}/v1/files/{file_id}/content?{query}"})


def file_body(file: StoredFile) -> dict[str, Any]:
    """Return a file as both clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "sample_type": file.sample_type,
        "source": "upload" if file.source == "upload" else "mistral",
        "num_lines": file.num_lines,
        "mimetype": None,
        "signature": file.sha256,
        "deleted": False,
    }


def list_body(data: list[dict[str, Any]], total: int, *, has_more: bool) -> dict[str, Any]:
    """Return a list as both clients read it."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "total": total,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _pieces(file: UploadFile) -> Iterator[bytes]:
    while piece := file.file.read(CHUNK_BYTES):
        yield piece


def _text_field(form: FormData, name: str) -> str | None:
    value = form.get(name)
    if value is None or isinstance(value, str):
        return value
    raise RequestError(f"{name} must be text, not a file", field=name)


def _expiry(form: FormData) -> float | None:
    """Return after how many seconds the file is to go: Mistral's `expiry` in hours, OpenAI's
    `expires_after[seconds]`.
    """
    # Mistral's client sends `workspace` unasked; here the workspace is the key's owner.
    if _text_field(form, "visibility") not in (None, "user", "workspace"):
        raise RequestError("visibility must be user or workspace", field="visibility")
    if _text_field(form, "expires_after[anchor]") not in (None, "created_at"):
        raise RequestError("expires_after[anchor] must be created_at", field="expires_after[anchor]")
    for name, unit in (("expiry", _HOUR_S), ("expires_after[seconds]", 1.0)):
        text = _text_field(form, name)
        if text is not None:
            if not (text.isascii() and text.isdecimal() and 0 < int(text[:12]) * unit <= _MAX_EXPIRY_S):
                raise RequestError(f"{name} must be a whole number, a year at most", field=name)
            return int(text) * unit
    return None


def _signature(gate: StoreGate, file_id: str, owner: str, until: int) -> str:
    return keyed_hash(gate.store.secret, "file_url", f"{file_id}\0{owner}\0{until}").hex()


def _signed_owner(request: Request, file_id: str) -> tuple[StoreGate, str]:
    """Return the gate and the owner that a signed link speaks for; AuthenticationError when it is forged."""
    gate: StoreGate = request.app.state.service.gate
    query = request.query_params
    refusal = AuthenticationError("the link is not valid or its time is over")
    until = query.get("until", "")
    try:
        owner = bytes.fromhex(query.get("owner", "")).decode()
    except ValueError:
        raise refusal from None
    if not (until.isascii() and until.isdecimal() and len(until) < 16):
        raise refusal
    expected = _signature(gate, file_id, owner, int(until))
    given = query.get("signature", "").encode()
    if not hmac.compare_digest(expected.encode(), given) or int(until) <= gate.store.clock():
        raise refusal
    return gate, owner
