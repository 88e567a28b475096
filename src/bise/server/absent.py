"""Routes of the hosted services that this server does not have: an honest 501 in JSON."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.server.problem import ApiError
from bise.server.service import Service

router = APIRouter()

REASONS = {
    "moderations": "there is no classifier model here",
    "chat/moderations": "there is no classifier model here",
    "classifications": "there is no classifier model here",
    "chat/classifications": "there is no classifier model here",
    "fine_tuning": "jobs are; permissions, archives and graders are not part of this server",
    "agents": "agents are not part of this server",
    "conversations": "conversations are kept by the assistant, not by this API",
    "libraries": "document libraries are not part of this server",
    "ocr": "this server reads text only",
    "audio": "this server reads and writes text only",
    "images": "this server writes text only",
    "assistants": "assistants are not part of this server",
    "threads": "threads are not part of this server",
    "vector_stores": "vector stores are not part of this server",
}
"""First part of the path after /v1/ and why it is not there."""

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def _add(path: str, reason: str) -> None:
    async def absent(request: Request) -> Response:
        service: Service = request.app.state.service
        await service.gate.authenticate(request)
        raise ApiError(
            501,
            f"/v1/{path} is not implemented: {reason}",
            code="not_implemented",
            headers={"x-should-retry": "false"},
        )

    for route in (f"/v1/{path}", f"/v1/{path}/{{rest:path}}"):
        router.add_api_route(route, absent, methods=METHODS, include_in_schema=False)


for _path, _reason in REASONS.items():
    _add(_path, _reason)
