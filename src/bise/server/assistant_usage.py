"""What people used and may use: sums of the ledger and the limits of accounts, for the assistant's page."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from bise.errors import NotFoundError, PermissionDeniedError
from bise.server.assistant_people import People, Person, check_origin

if TYPE_CHECKING:
    from bise.server.gate import StoreGate

_SHOWN = ("tokens_per_day", "money_per_month", "requests_per_minute", "tokens_per_minute", "concurrency")


class LimitsChange(BaseModel):
    """Limits to set; null lifts one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens_per_day: int | None = Field(default=None)
    money_per_month: str | None = Field(default=None)


def usage_router(people: People) -> APIRouter:
    """Return the routes; everyone sees their own sums, an admin those of all accounts."""

    async def who(request: Request) -> Person:
        check_origin(request)
        return await people.person(request)

    person_: Any = Depends(who)
    router = APIRouter(prefix="/api/v1", include_in_schema=False)

    @router.get("/usage")
    async def usage(request: Request, person: Person = person_) -> dict[str, Any]:
        gate = _gate(request)
        allowance = None
        if await gate.offload(_has_account, gate, person.owner):
            allowance = await gate.offload(gate.store.allowances.get, person.owner)
        limits = {} if allowance is None else allowance.limits.as_json()
        return {
            "currency": (await gate.offload(gate.store.prices.rates)).currency,
            "limits": {name: limits[name] for name in _SHOWN if name in limits},
            **await gate.offload(partial(_sums, gate, person.owner)),
        }

    @router.get("/usage/accounts")
    async def everyone(request: Request, person: Person = person_) -> dict[str, Any]:
        gate = _gate(request)
        _check_admin(person)

        def work() -> list[dict[str, Any]]:
            _, month = _starts()
            found: list[dict[str, Any]] = []
            for entry in gate.store.allowances.list():
                (total,) = gate.store.ledger.sums(owner=entry.account_id, since=month)
                found.append(
                    {
                        "id": entry.account_id,
                        "name": entry.name,
                        "limits": entry.limits.as_json(),
                        "month": total.as_json(),
                    }
                )
            return found

        return {"accounts": await gate.offload(work)}

    @router.patch("/usage/accounts/{account_id}")
    async def change(
        request: Request, account_id: str, body: LimitsChange, person: Person = person_
    ) -> dict[str, Any]:
        gate = _gate(request)
        _check_admin(person)
        changes = body.model_dump(exclude_unset=True)
        changed = await gate.offload(gate.store.allowances.change, account_id, changes, None)
        return {"id": changed.account_id, "limits": changed.limits.as_json()}

    return router


def _gate(request: Request) -> StoreGate:
    gate: StoreGate = request.app.state.service.gate
    return gate


def _check_admin(person: Person) -> None:
    if person.role != "admin":
        raise PermissionDeniedError("only an admin may do this")


def _has_account(gate: StoreGate, owner: str) -> bool:
    try:
        gate.store.allowances.get(owner)
    except NotFoundError:
        return False
    return True


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
