"""What people in the assistant may use and have used: everyone their own, an admin everybody's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request

from bise.errors import PermissionDeniedError
from bise.server.assistant_people import check_origin

if TYPE_CHECKING:
    from bise.server.assistant_people import Person
    from bise.server.entry import StorePeople
    from bise.server.gate import StoreGate


class LimitChange(BaseModel):
    """Limits to change; one that is null is lifted."""

    model_config = ConfigDict(extra="forbid", strict=True)
    limits: dict[str, Any]


def quota_router(gate: StoreGate, people: StorePeople) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/api/v1", include_in_schema=False)

    async def admin(request: Request) -> Person:
        check_origin(request)
        person = await people.person(request)
        if person.role != "admin":
            raise PermissionDeniedError("only an admin may do this")
        return person

    @router.get("/quota")
    async def quota(request: Request) -> dict[str, Any]:
        """Return the limits of whoever asks and what is used of them."""
        check_origin(request)
        _, caller = await people.known(request)
        if caller.key is None:
            return {"limits": {}, "used": {}}
        used = await gate.offload(gate.store.limits.used, caller.key)
        return {"limits": caller.key.limits.as_json(), "used": used}

    @router.get("/limits")
    async def limits(request: Request) -> dict[str, Any]:
        """List all accounts with their limits."""
        await admin(request)
        everyone = await gate.offload(gate.store.allowances.everyone)
        accounts = await gate.offload(gate.store.allowances.list)
        return {"accounts": [entry.as_json() for entry in (everyone, *accounts)]}

    @router.patch("/limits/{account}")
    async def change(request: Request, account: str, body: LimitChange) -> dict[str, Any]:
        """Change some of what an account may use; `*` stands for all without limits of their own."""
        await admin(request)
        changed = await gate.offload(gate.store.allowances.change, account, body.limits)
        return changed.as_json()

    return router
