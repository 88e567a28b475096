"""GET /metrics for Prometheus, with the scope metrics or admin."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.server.metrics import CONTENT_TYPE
from bise.server.openapi import documented
from bise.server.stored import enter

router = APIRouter()


@router.get("/metrics", **documented(None, "Metrics for Prometheus.", tag="operation"))
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text form."""
    gate, _ = await enter(request, "metrics")
    return Response(gate.metrics.page(request.app.state.service.engines()), media_type=CONTENT_TYPE)
