"""/v1/admin: keys and prices, for keys with the scope admin."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bise.server.body import WireModel, read_json
from bise.server.openapi import documented
from bise.server.stored import choice_argument, enter
from bise.store.keys import amount, limits_from_json
from bise.store.prices import HouseRates, Price
from bise.store.rules import rules_from_json

router = APIRouter()


class NewKey(WireModel):
    """POST /v1/admin/keys."""

    name: str
    owner: str | None = None
    scopes: list[str] = Field(default_factory=lambda: ["inference"], max_length=100)
    limits: dict[str, Any] = Field(default_factory=dict[str, Any])
    rules: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    expires_at: int | None = Field(None, ge=0, le=10**11)


class KeyChange(WireModel):
    """PATCH /v1/admin/keys/{key_id} and /v1/admin/accounts/{account}: a limit that is null is lifted."""

    limits: dict[str, Any] | None = None
    rules: list[dict[str, Any]] | None = None


class NewPrice(WireModel):
    """PUT /v1/admin/prices: amounts are strings, per million tokens."""

    model: str
    input: str
    cached: str | None = None
    output: str


class NewRates(WireModel):
    """PUT /v1/admin/rates: amounts are strings."""

    currency: str = "EUR"
    energy: str | None = None
    hardware: str | None = None
    hardware_years: str = "4"


@router.post("/v1/admin/keys", **documented(NewKey, "Make a key; it is shown once.", tag="admin"))
async def create_key(request: Request) -> Response:
    """Make a key; the answer is the only place where it is ever shown."""
    gate, _ = await enter(request, "admin")
    body = await read_json(request, NewKey)
    info, key = await gate.offload(
        gate.store.keys.create,
        body.name,
        owner=body.owner,
        scopes=body.scopes,
        limits=limits_from_json(body.limits),
        rules=rules_from_json(body.rules),
        expires_at=None if body.expires_at is None else float(body.expires_at),
    )
    return JSONResponse({**info.as_json(), "key": key})


@router.get("/v1/admin/keys", **documented(None, "List keys.", tag="admin"))
async def list_keys(request: Request) -> Response:
    """List keys; revoked ones with `revoked=true`."""
    gate, _ = await enter(request, "admin")
    with_revoked = choice_argument(request, "revoked", ("true", "false")) == "true"
    keys = await gate.offload(gate.store.keys.list, with_revoked=with_revoked)
    return JSONResponse({"object": "list", "data": [key.as_json() for key in keys]})


@router.get("/v1/admin/keys/{key_id}", **documented(None, "Describe a key.", tag="admin"))
async def get_key(request: Request, key_id: str) -> Response:
    """Describe a key."""
    gate, _ = await enter(request, "admin")
    return JSONResponse((await gate.offload(gate.store.keys.get, key_id)).as_json())


@router.patch("/v1/admin/keys/{key_id}", **documented(KeyChange, "Change a key's limits.", tag="admin"))
async def change_key(request: Request, key_id: str) -> Response:
    """Change some of a key's limits or replace its guardrails, from its next request on."""
    gate, _ = await enter(request, "admin")
    body = await read_json(request, KeyChange)
    await gate.offload(gate.store.keys.get, key_id)
    rules = None if body.rules is None else rules_from_json(body.rules)
    return JSONResponse((await gate.offload(gate.store.keys.change, key_id, body.limits, rules)).as_json())


@router.get("/v1/admin/accounts", **documented(None, "List accounts and their limits.", tag="admin"))
async def list_accounts(request: Request) -> Response:
    """List the accounts of the assistant; `*` stands for all without limits of their own."""
    gate, _ = await enter(request, "admin")
    everyone = await gate.offload(gate.store.allowances.everyone)
    accounts = await gate.offload(gate.store.allowances.list)
    return JSONResponse({"object": "list", "data": [entry.as_json() for entry in (everyone, *accounts)]})


@router.patch(
    "/v1/admin/accounts/{account}", **documented(KeyChange, "Change an account's limits.", tag="admin")
)
async def change_account(request: Request, account: str) -> Response:
    """Change some of what an account (id, name or `*`) may use."""
    gate, _ = await enter(request, "admin")
    body = await read_json(request, KeyChange)
    rules = None if body.rules is None else rules_from_json(body.rules)
    changed = await gate.offload(gate.store.allowances.change, account, body.limits, rules)
    return JSONResponse(changed.as_json())


@router.delete("/v1/admin/keys/{key_id}", **documented(None, "Revoke a key.", tag="admin"))
async def revoke_key(request: Request, key_id: str) -> Response:
    """Revoke a key at once."""
    gate, _ = await enter(request, "admin")
    await gate.offload(gate.store.keys.get, key_id)
    return JSONResponse((await gate.offload(gate.store.keys.revoke, key_id)).as_json())


@router.get("/v1/admin/prices", **documented(None, "Show the price book.", tag="admin"))
async def list_prices(request: Request) -> Response:
    """Show the price book and the rates of this machine."""
    gate, _ = await enter(request, "admin")
    prices = await gate.offload(gate.store.prices.list)
    rates = await gate.offload(gate.store.prices.rates)
    return JSONResponse(
        {"object": "list", "rates": rates.as_json(), "data": [price.as_json() for price in prices]}
    )


@router.put("/v1/admin/prices", **documented(NewPrice, "Set a model's price.", tag="admin"))
async def set_price(request: Request) -> Response:
    """Set a model's price; without `cached`, cached tokens cost what others cost."""
    gate, _ = await enter(request, "admin")
    body = await read_json(request, NewPrice)
    price = Price(
        model=body.model,
        input=amount("input", body.input),
        cached=amount("cached", body.input if body.cached is None else body.cached),
        output=amount("output", body.output),
    )
    await gate.offload(gate.store.prices.set, price)
    return JSONResponse(price.as_json())


@router.delete("/v1/admin/prices/{model:path}", **documented(None, "Remove a price.", tag="admin"))
async def remove_price(request: Request, model: str) -> Response:
    """Strike a model from the price book."""
    gate, _ = await enter(request, "admin")
    await gate.offload(gate.store.prices.remove, model)
    return JSONResponse({"model": model, "deleted": True})


@router.put("/v1/admin/rates", **documented(NewRates, "Set what the machine costs.", tag="admin"))
async def set_rates(request: Request) -> Response:
    """Set the currency, the price of energy and the machine's own price."""
    gate, _ = await enter(request, "admin")
    body = await read_json(request, NewRates)
    rates = HouseRates(
        currency=body.currency,
        energy=None if body.energy is None else amount("energy", body.energy),
        hardware=None if body.hardware is None else amount("hardware", body.hardware),
        hardware_years=amount("hardware_years", body.hardware_years),
    )
    await gate.offload(gate.store.prices.set_rates, rates)
    return JSONResponse(rates.as_json())
