"""GET /v1/usage: the ledger's sums and rows. A key sees its owner's, an admin everyone's. Never any text."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.server.openapi import documented
from bise.server.stored import choice_argument, enter, text_argument, whole_argument
from bise.store.ledger import GROUPS
from bise.store.schema import LedgerRecord

router = APIRouter()

_LAST_SECOND = 10**11


@router.get("/v1/usage", **documented(None, "Sum up usage.", tag="usage"))
async def usage(request: Request) -> Response:
    """Return sums per `by` (key, model, adapter, day, endpoint) and their total."""
    gate, caller = await enter(request)
    by = choice_argument(request, "by", GROUPS)
    sums = partial(
        gate.store.ledger.sums,
        owner=text_argument(request, "owner") if caller.is_admin else caller.owner,
        since=float(whole_argument(request, "since", 0, 0, _LAST_SECOND)),
        until=float(whole_argument(request, "until", _LAST_SECOND, 0, _LAST_SECOND)),
    )
    groups = await gate.offload(sums, by) if by else []
    (total,) = await gate.offload(sums, None)
    rates = await gate.offload(gate.store.prices.rates)
    return JSONResponse(
        {
            "object": "list",
            "by": by,
            "currency": rates.currency,
            "energy_sources": list(gate.energy_sources),
            "data": [group.as_json() for group in groups],
            "total": total.as_json(),
        }
    )


@router.get("/v1/usage/requests", **documented(None, "List single requests.", tag="usage"))
async def requests(request: Request) -> Response:
    """Return the newest rows of the ledger; `before` is the last id of the page before."""
    gate, caller = await enter(request)
    limit = whole_argument(request, "limit", 100, 1, 1000)
    before = whole_argument(request, "before", 0, 0, 10**15) or None
    owner = text_argument(request, "owner") if caller.is_admin else caller.owner
    rows = await gate.offload(gate.store.ledger.rows, owner=owner, limit=limit + 1, before=before)
    data = [_row(row) for row in rows[:limit]]
    return JSONResponse({"object": "list", "data": data, "has_more": len(rows) > limit})


def _row(record: LedgerRecord) -> dict[str, Any]:
    names = (
        "id", "at", "request_id", "key_id", "owner", "endpoint", "model", "adapter", "prompt_tokens",
        "cached_tokens", "completion_tokens", "queue_s", "prefill_s", "decode_s", "energy_j",
        "finish_reason", "error_code", "rule",
    )  # fmt: skip
    row = {name: getattr(record, name) for name in names}
    for name, value in (("cost", record.cost), ("house_cost", record.house_cost)):
        row[name] = None if value is None else f"{value:f}"
    return row
