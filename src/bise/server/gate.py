"""The gate in front of every route: who asks, what they may do and how much, and the row in the ledger.

Nobody gets in without a key, except on a loopback address as long as no key was ever made, and except where
the operator serves without keys. A database that does not answer lets nobody in; what ends meanwhile is kept
in memory and written when it answers again.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from bise.errors import (
    AuthenticationError,
    PermissionDeniedError,
    RateLimitError,
    RequestError,
    StoreError,
    quoted,
)
from bise.server.access import LOCAL_OWNER, Access, Caller, is_loopback, presented_key
from bise.server.lanes import Lanes
from bise.server.metrics import Metrics
from bise.server.store_ticket import StoreTicket
from bise.store.energy import MachineMeter, Shares
from bise.store.keys import ALLOWANCE_PREFIX, KEY_PREFIX, KeyInfo
from bise.store.ledger import LedgerRow
from bise.store.limits import UNPLACED, Reservation
from bise.store.prices import Price
from bise.store.rules import Guard
from bise.store.secret import keyed_hash
from bise.store.worker import LEASE_S

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from starlette.requests import Request

    from bise.store.opening import Store

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_UNWRITTEN = 10_000
"""Ledger rows kept in memory while the database does not answer; past it nobody is let in."""
MAX_IDEMPOTENCY_KEY = 200
INTERNAL = "bise.caller"
"""Where in the ASGI scope our own background work says for whom it runs; nothing from outside gets there."""
PASS_COOKIE = "bise_pass"  # noqa: S105  # a name
"""Cookie of the operator's browser; see `bise.server.entry`."""
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unwritten:
    """A row that waits for the database."""

    row: LedgerRow
    reservation: Reservation | None
    at: float
    machine_s: float


class StoreGate:
    """The gate over a store; one per server. `start` it on the event loop, `stop` it at the end."""

    def __init__(
        self,
        store: Store,
        *,
        access: Access = Access.AUTO,
        is_local_only: bool = True,
        canonical: Callable[[str], str] = str,
        metrics: Metrics | None = None,
        shares: Shares | None = None,
    ) -> None:
        """`is_local_only` says that the server listens on a loopback address; `canonical` turns a model's
        alias into its name.
        """
        self.store = store
        self.metrics = metrics or Metrics()
        self._access = access
        self._is_local_only = is_local_only
        self._canonical = canonical
        meter = MachineMeter()
        self.energy_sources = meter.sources
        """What the energy in the ledger was read from; empty where it cannot be read."""
        self.metrics.tell_energy(meter.sources)
        logger.info("event=energy sources=%s", "+".join(meter.sources) or "none")
        self._shares = shares or Shares(meter.joules)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="bise-store")
        self._lanes = Lanes(lambda key_id: len(self._open[key_id]))
        self._unwritten: deque[_Unwritten] = deque()
        self._writing_late = threading.Lock()
        self._open: defaultdict[str, set[str]] = defaultdict(set)
        """Ids of the places that requests of each key hold now."""
        self._has_keys = False
        self.local_pass = secrets.token_urlsafe(32)
        """What lets the operator's browser in, as long as this process lives."""
        self._tasks: list[asyncio.Task[None]] = []
        self.on_new_batch: Callable[[], None] | None = None
        """Called when a batch was queued; the worker's."""

    def wake_worker(self) -> None:
        """Tell the batch worker, if there is one, that a job was queued."""
        if self.on_new_batch is not None:
            self.on_new_batch()

    async def start(self) -> None:
        """Begin to renew leases and to write rows that could not be written."""
        self._tasks = [asyncio.create_task(self._keep_writing()), asyncio.create_task(self._keep_leases())]

    async def stop(self) -> None:
        """Write what is left and stop. Rows that cannot be written are counted in the log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.offload(self.write_late)
        if self._unwritten:
            logger.error("event=ledger_rows_lost count=%d", len(self._unwritten))
        self._pool.shutdown()

    async def offload(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call to the store in a thread; it goes on to its end even when the caller is cancelled."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._pool, lambda: function(*args, **kwargs)))

    async def offload_for(
        self, key_id: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run a call to the store as `offload` does, for a new request of a key: see `bise.server.lanes`."""
        async with self._lanes.place(key_id):
            return await self.offload(function, *args, **kwargs)

    async def authenticate(self, request: Request) -> None:
        """Refuse a request without a good key. Every route calls it first."""
        await self.caller(request)

    async def caller(self, request: Request, scope: str = "read") -> Caller:
        """Return who asks. Raises AuthenticationError, PermissionDeniedError without the scope, StoreError
        when the database does not answer.
        """
        known = request.scope.setdefault("state", {})
        if "caller" not in known:
            try:
                known["caller"] = await self._identify(request)
            except AuthenticationError:
                self.metrics.refuse("unauthenticated")
                raise
        caller: Caller = known["caller"]
        try:
            caller.require(scope)
        except PermissionDeniedError:
            self.metrics.refuse("forbidden")
            raise
        return caller

    async def admit(self, request: Request, *, scope: str, model: str | None) -> StoreTicket:
        """Let a request in that will run on a model, and return its ticket; see `bise.server.ticket.Gate`."""
        caller = await self.caller(request, scope)
        return await self.admit_caller(
            caller,
            model=model,
            endpoint=_endpoint(request),
            request_id=str(request.scope["state"].get("request_id", "")),
            idempotency_key=caller.idempotency_key or await self._idempotency_key(request),
        )

    async def admit_caller(
        self,
        caller: Caller,
        *,
        model: str | None,
        endpoint: str,
        request_id: str,
        idempotency_key: str | None = None,
        is_aside: bool = False,
    ) -> StoreTicket:
        """Let someone in who is known, and return the ticket. Raises PermissionDeniedError for a model that
        the key may not use, RateLimitError, StoreError.

        `is_aside`: nobody asked for it, it belongs to a request; it uses tokens and money, but is no request.
        """
        key = caller.key
        if key is not None and model is not None and not key.allows_model(self._name_of(model)):
            self.metrics.refuse("forbidden")
            raise PermissionDeniedError("this key may not use that model", field="model")
        if len(self._unwritten) >= MAX_UNWRITTEN:
            raise StoreError("usage cannot be recorded now; try again soon")
        reservation = None
        if key is not None and is_aside:
            await self.check_tokens(caller, model or "", 0, 0)
            reservation = Reservation(id=UNPLACED, key_id=key.id, requests=None, tokens=None)
        elif key is not None:
            try:
                reservation = await self.offload_for(key.id, self.store.limits.reserve, key)
            except RateLimitError:
                self.metrics.refuse("rate_limit")
                raise
            self._open[key.id].add(reservation.id)
        return StoreTicket(
            gate=self,
            share=self.begin_share(),
            caller=caller,
            reservation=reservation,
            guard=Guard(key.rules) if key is not None and key.rules else None,
            draft=LedgerRow(
                request_id=request_id,
                key_id=caller.key_id,
                owner=caller.owner,
                endpoint=endpoint,
                model="",
                idempotency_key=idempotency_key,
            ),
        )

    async def caller_of_account(self, account_id: str, name: str = "") -> Caller:
        """Return what someone who is signed in may do and use."""
        allowance = await self.offload(self.store.allowances.of, account_id, name)
        return Caller(owner=account_id, scopes=allowance.scopes, key=allowance)

    async def check(self, caller: Caller) -> None:
        """Raise RateLimitError when `caller` could not begin a request now; books nothing."""
        if caller.key is None:
            return
        try:
            await self.offload(self.store.limits.check, caller.key)
        except RateLimitError:
            self.metrics.refuse("rate_limit")
            raise

    async def check_tokens(self, caller: Caller, model: str, prompt: int, most: int) -> None:
        """Raise RateLimitError when `caller` has not so many tokens, or their price, left; books nothing."""
        if caller.key is not None:
            cost = await self.offload(self.cost, model, prompt, 0, most)
            check = partial(self.store.limits.check, is_new=False)
            await self.offload(check, caller.key, prompt + most, cost or Decimal(0))

    async def check_training(self, caller: Caller, model: str) -> None:
        """Raise PermissionDeniedError when the caller may not use the model, or has a limit in money and the
        model no price; RateLimitError when nothing is left of the caller's tokens or money.
        """
        key = caller.key
        if key is None:
            return
        if not key.allows_model(self._name_of(model)):
            self.metrics.refuse("forbidden")
            raise PermissionDeniedError("this key may not use that model", field="model")
        _require_price(key, model, await self.offload(self.store.prices.get, model))
        await self.check_tokens(caller, model, 1, 0)

    def record_training(self, row: LedgerRow, share: str) -> LedgerRow:
        """Write what a fine-tuning job has used: its tokens are input tokens of its model, and count against
        the days and months of the key that made it.
        """
        key_id = row.key_id
        reservation = (
            None if key_id is None else Reservation(id=UNPLACED, key_id=key_id, requests=None, tokens=None)
        )
        return self.record(row, reservation, share)

    def begin_share(self) -> str:
        """Begin to count a request's part of the machine's time and energy; `record` ends it."""
        share = secrets.token_hex(8)
        self._shares.enter(share)
        return share

    def end_share(self, share: str) -> None:
        """End a share of what made no row."""
        self._shares.leave(share)

    def cost(
        self, model: str, prompt: int, cached: int, completion: int, session: Session | None = None
    ) -> Decimal | None:
        """Return what tokens cost by the price book; None for a model without a price."""
        price = self.store.prices.get(model, session)
        return None if price is None else price.of(prompt, cached, completion)

    def extend(
        self,
        reservation: Reservation,
        key: KeyInfo,
        model: str,
        prompt: int,
        most: int,
        least: int | None = None,
    ) -> Reservation:
        """Reserve tokens and their price. RateLimitError gives the place up; PermissionDeniedError when the
        key has a limit in money and the model has no price.
        """
        price = self.store.prices.get(model)
        _require_price(key, model, price)
        try:
            return self.store.limits.extend(
                reservation,
                key,
                prompt + most,
                Decimal(0) if price is None else price.of(prompt, 0, most),
                least=None if least is None else prompt + least,
                token_cost=Decimal(0) if price is None else price.of(0, 0, 1),
            )
        except RateLimitError:
            self._open[key.id].discard(reservation.id)
            self.metrics.refuse("rate_limit")
            raise

    def record(self, row: LedgerRow, reservation: Reservation | None, share: str) -> LedgerRow:
        """Finish a row (energy, costs), write it and settle the reservation at once; return it."""
        machine_s, energy_j = self._shares.leave(share)
        if reservation is not None:
            self._open[reservation.key_id].discard(reservation.id)
        entry = _Unwritten(
            row=replace(row, energy_j=energy_j),
            reservation=reservation,
            at=self.store.clock(),
            machine_s=machine_s,
        )
        try:
            return self._write(entry)
        except StoreError:
            logger.warning(
                "event=ledger_row_waits request_id=%s waiting=%d", row.request_id, len(self._unwritten) + 1
            )
            self._unwritten.append(entry)
            return entry.row

    def write_late(self) -> int:
        """Write rows that wait for the database, oldest first; return how many still wait."""
        with self._writing_late:
            while self._unwritten:
                entry = self._unwritten[0]
                try:
                    self._write(entry)
                except StoreError:
                    break
                except Exception:  # its key is not in the backup that came back, say: the others go on
                    logger.exception("event=ledger_row_lost request_id=%s", entry.row.request_id)
                self._unwritten.popleft()
            return len(self._unwritten)

    def _write(self, entry: _Unwritten) -> LedgerRow:
        """Write a row with its costs and settle its reservation, in one transaction; return the row."""
        row = entry.row
        tokens = row.prompt_tokens + row.completion_tokens
        with self.store.database.writing() as session:
            used = (row.prompt_tokens, row.cached_tokens, row.completion_tokens)
            cost = Decimal(0) if row.is_free else self.cost(row.model, *used, session)
            house_cost = self.store.prices.rates(session).of(entry.machine_s, row.energy_j)
            row = replace(row, cost=cost, house_cost=house_cost)
            if entry.reservation is not None and row.idempotency_key is not None:
                # Whoever repeats it may end now, too, and must find the row that is written here.
                self.store.limits.hold(entry.reservation, session)
            is_new = self.store.ledger.record(row, session, entry.at)
            if entry.reservation is not None:
                self.store.limits.settle(
                    entry.reservation,
                    tokens,
                    cost or Decimal(0),
                    session,
                    at=entry.at,
                    is_billed=is_new,
                )
        if is_new:
            self.metrics.count(row)
        return row

    async def _identify(self, request: Request) -> Caller:
        internal = request.scope.get(INTERNAL)
        if internal is not None:
            return cast(Caller, internal)
        presented = presented_key(request)
        if presented is not None:
            try:
                key = await self._verified(presented)
            except AuthenticationError:
                # Clients insist on a key; where none is needed anything goes that is not meant to be ours.
                if presented.startswith(KEY_PREFIX) or not await self._needs_no_key(request):
                    raise
            else:
                return Caller(owner=key.owner, scopes=key.scopes, key=key)
        elif self.is_pass(request.cookies.get(PASS_COOKIE, "")):
            return Caller(owner=LOCAL_OWNER, scopes=frozenset({"inference"}))
        elif not await self._needs_no_key(request):
            raise AuthenticationError(self._way_in(request))
        scopes = {"inference"} if self._access is Access.OPEN else {"inference", "metrics", "admin"}
        return Caller(owner=LOCAL_OWNER, scopes=frozenset(scopes))

    async def _verified(self, presented: str) -> KeyInfo:
        """Return whose key this is. Read from a file here and now: it takes a quarter of a millisecond, and a
        change of threads takes more.
        """
        if self.store.database.is_sqlite:
            try:
                return self.store.keys.verify(presented, waits=False)
            except StoreError:
                pass  # another process keeps the file to itself: a thread waits for it
        return await self.offload(self.store.keys.verify, presented)

    def is_pass(self, given: str) -> bool:
        """Return True for the pass that was printed where the server runs."""
        is_equal = hmac.compare_digest(given.encode(), self.local_pass.encode())
        return is_equal and self._access is Access.AUTO

    def is_from_here(self, request: Request) -> bool:
        """Return True for a request from this machine to a server that only this machine can reach."""
        client = request.client
        return self._is_local_only and client is not None and is_loopback(client.host)

    def _way_in(self, request: Request) -> str:
        """Return what someone without a key is told; on this machine also where keys come from."""
        text = "an API key is needed: send it as `Authorization: Bearer KEY`"
        if not self.is_from_here(request):
            return text
        if self._access is Access.REQUIRED:
            return f"{text}; `bise keys create --name NAME` makes one"
        return (
            f"{text}; `bise keys create --name NAME` makes one. Since the first key was made this machine "
            "needs one, too, also when all are revoked; `bise serve --no-key` asks nobody"
        )

    async def _needs_no_key(self, request: Request) -> bool:
        if self._access is not Access.AUTO:
            return self._access is Access.OPEN
        if not self.is_from_here(request):
            return False
        if not self._has_keys:
            self._has_keys = await self.offload(self.store.keys.any_exist)
        return not self._has_keys

    async def _idempotency_key(self, request: Request) -> str | None:
        """Return what a retry shares with its first attempt: the client's key and the very same body."""
        given = request.headers.get("idempotency-key")
        if given is None:
            return None
        if not 0 < len(given) <= MAX_IDEMPOTENCY_KEY or not given.isprintable():
            raise RequestError(
                f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} printable characters",
                field="Idempotency-Key",
            )
        body = (await request.body()).decode("latin-1")
        return keyed_hash(self.store.secret, "idempotency", f"{given}\0{body}").hex()

    def _name_of(self, model: str) -> str:
        try:
            return self._canonical(model)
        except Exception:  # an unknown model is refused further on, by whoever knows models
            return model

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._unwritten:
                await self.offload(self.write_late)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                held = [place for places in list(self._open.values()) for place in list(places)]
                await self.offload(self.store.limits.renew, held)
                await self.offload(self.store.replays.renew)
            except StoreError:
                continue


def _require_price(key: KeyInfo, model: str, price: Price | None) -> None:
    """Raise PermissionDeniedError for a key with a limit in money where nothing says what a model costs."""
    if price is None and key.limits.money_per_month is not None:
        whose = "your account" if key.id.startswith(ALLOWANCE_PREFIX) else "this key"
        raise PermissionDeniedError(
            f"{whose} has a limit in money, and nothing says what {quoted(model)} costs; an admin can set "
            "its price with `bise prices set` or lift the limit",
            field="model",
        )


def _endpoint(request: Request) -> str:
    """Return the route that was asked for, without ids: sums and metrics go by it, so there must be few."""
    route = request.scope.get("route")
    return getattr(route, "path", None) or str(request.scope["path"])[:200]
