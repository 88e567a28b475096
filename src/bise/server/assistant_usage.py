"""What people used and may use: sums of the ledger and the limits of accounts, for the assistant's page."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from bise.errors import PermissionDeniedError
from bise.server.assistant_people import Person, check_body, check_origin

if TYPE_CHECKING:
    from bise.assistant.models import ChatModels
    from bise.server.entry import StorePeople
    from bise.server.gate import StoreGate

_SHOWN = ("tokens_per_day", "money_per_month", "requests_per_minute", "tokens_per_minute", "concurrency")


class LimitChange(BaseModel):
    """Limits to change; one that is null is lifted."""

    model_config = ConfigDict(extra="forbid", strict=True)
    limits: dict[str, Any]


def usage_router(people: StorePeople, models: ChatModels) -> APIRouter:
    """Return the routes; everyone sees their own sums and limits, an admin those of all accounts."""

    async def admin(request: Request) -> Person:
        check_origin(request)
        person = await people.person(request)
        if person.role != "admin":
            raise PermissionDeniedError("only an admin may do this")
        await check_body(request)
        return person

    boss: Any = Depends(admin)
    router = APIRouter(prefix="/api/v1", include_in_schema=False)

    @router.get("/usage")
    async def usage(request: Request) -> dict[str, Any]:
        check_origin(request)
        gate = _gate(request)
        person, caller = await people.known(request)
        key = caller.key
        limits = {} if key is None else key.limits.as_json()
        used = {} if key is None else await gate.offload(gate.store.limits.used, key)
        shown = [name for name in _SHOWN if name in limits]
        return {
            "currency": (await gate.offload(gate.store.prices.rates)).currency,
            "limits": {name: limits[name] for name in shown},
            "used": {name: used[name] for name in shown},
            **await gate.offload(partial(_sums, gate, person.owner)),
        }

    @router.get("/usage/accounts")
    async def everyone(request: Request, person: Person = boss) -> dict[str, Any]:
        gate = _gate(request)
        return {"accounts": await gate.offload(_months, gate)}

    @router.get("/limits")
    async def limits(request: Request, person: Person = boss) -> dict[str, Any]:
        gate = _gate(request)
        return await gate.offload(_limits, gate, models)

    @router.patch("/limits/{account}")
    async def change(
        request: Request, account: str, body: LimitChange, person: Person = boss
    ) -> dict[str, Any]:
        gate = _gate(request)
        return (await gate.offload(gate.store.allowances.change, account, body.limits)).as_json()

    return router


def _months(gate: StoreGate) -> list[dict[str, Any]]:
    """Return what every account used this month."""
    _, month = _starts()
    found: list[dict[str, Any]] = []
    for entry in gate.store.allowances.list():
        (total,) = gate.store.ledger.sums(owner=entry.account_id, since=month)
        found.append({"id": entry.account_id, "name": entry.name, "month": total.as_json()})
    return found


def _limits(gate: StoreGate, models: ChatModels) -> dict[str, Any]:
    """Return everyone's limits, and the models that nobody with a limit in money may use."""
    allowances, prices = gate.store.allowances, gate.store.prices
    names = [facts.id for facts in models.facts()]
    return {
        "accounts": [entry.as_json() for entry in (allowances.everyone(), *allowances.list())],
        "unpriced": [name for name in names if prices.get(name) is None],
    }


def _gate(request: Request) -> StoreGate:
    gate: StoreGate = request.app.state.service.gate
    return gate


def _starts() -> tuple[float, float]:
    """Return when this day and this month began, in UTC, as limits count them."""
    day = datetime.fromtimestamp(time.time(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day.timestamp(), day.replace(day=1).timestamp()


def _sums(gate: StoreGate, owner: str) -> dict[str, Any]:
    day, month = _starts()
    ledger = gate.store.ledger
    (today,) = ledger.sums(owner=owner, since=day)
    (this_month,) = ledger.sums(owner=owner, since=month)
    models = ledger.sums("model", owner=owner, since=month)
    days = ledger.sums("day", owner=owner, since=month)
    return {
        "today": today.as_json(),
        "month": this_month.as_json(),
        "models": [entry.as_json() for entry in models],
        "days": [entry.as_json() for entry in days],
    }
