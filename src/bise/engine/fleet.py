"""Several models in one process under one memory budget: loaded on demand, unloaded when idle or when another
needs the room, never while someone uses them.

Every model has a plan (engine/model_spec.py), so its size is known before it is loaded: the sum of the plans
of what is loaded stays within the budget. Thread-safe; loading and closing happen outside the lock, in the
thread of whoever asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Self

from bise.engine.load import LoadedModel
from bise.engine.memory import available_memory
from bise.engine.model_spec import ModelCard, ModelPlan, ModelSpec, load_planned, plan_model
from bise.errors import (
    BiseError,
    ConfigError,
    EngineError,
    MemoryPlanError,
    ModelBusyError,
    ModelNotFoundError,
)

logger = logging.getLogger(__name__)

Planner = Callable[[ModelSpec, int | None], ModelPlan]
Loader = Callable[[ModelSpec, ModelPlan], LoadedModel]


class _State(StrEnum):
    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"


class _Load:
    """One attempt to load; those who wait for it share its outcome."""

    error: BiseError | None = None


class _Entry:
    """A model of the fleet; all fields but `spec` belong to the fleet's lock."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.plan: ModelPlan | None = None
        self.fault: BiseError | None = None
        self.state = _State.COLD
        self.load: _Load | None = None
        self.loaded: LoadedModel | None = None
        self.pins = 0
        self.last_used = 0.0

    @property
    def held_bytes(self) -> int:
        """Bytes that count against the budget now."""
        return 0 if self.state is _State.COLD or self.plan is None else self.plan.size_bytes


class Lease:
    """A loaded model that stays loaded until `release`."""

    def __init__(self, loaded: LoadedModel, adapter: str | None, release: Callable[[], None]) -> None:
        self.loaded = loaded
        self.adapter = adapter
        """What to put into `Request.adapter`."""
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the model go; a second call does nothing. Finish or cancel its requests before."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Fleet:
    """The models that one process serves; see `use`. Use it as a context manager, or `close` it."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        memory_bytes: int | None = None,
        idle_s: float | None = None,
        *,
        wait_s: float = 30.0,
        planner: Planner = plan_model,
        loader: Loader = load_planned,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Plan `specs` within `memory_bytes` beyond the process itself (None: what is free now).

        A model without users for `idle_s` seconds is unloaded (None: only when another needs the room).
        Whoever needs the room of models in use waits `wait_s` seconds unless told otherwise. A model whose
        files are bad shows it in its card. Loads nothing. Raises ConfigError when two models share a name.
        """
        self._entries: dict[str, _Entry] = {}
        self._names: dict[str, _Entry] = {}
        for spec in specs:
            self._entries[spec.name] = entry = _Entry(spec)
            for name in (spec.name, *spec.aliases):
                if name in self._names:
                    raise ConfigError(f"two models are called '{name}'; rename one", field="name")
                self._names[name] = entry
        self.memory_bytes = available_memory() if memory_bytes is None else memory_bytes
        """Bytes that all loaded models together may take; None where the system does not tell."""
        self._idle_s = idle_s
        self._wait_s = wait_s
        self._planner = planner
        self._loader = loader
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        """Those who wait for room, in order of arrival; nobody overtakes the first."""
        self._is_closing = False
        self._plan_all()
        self._reaper: threading.Thread | None = None
        if idle_s is not None:
            self._reaper = threading.Thread(target=self._reap, name="bise-fleet", daemon=True)
            self._reaper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is

    def names(self) -> tuple[str, ...]:
        """Return the models' names, in the order of their specs; aliases are in the cards."""
        return tuple(self._entries)

    def cards(self) -> tuple[ModelCard, ...]:
        """Return what is known of every model without loading it."""
        with self._changed:
            return tuple(self._card(entry) for entry in self._entries.values())

    def card(self, name: str) -> ModelCard:
        """Return one model's card, by name or alias. Raises ModelNotFoundError."""
        with self._changed:
            return self._card(self._find(name))

    @property
    def used_bytes(self) -> int:
        """Bytes planned for what is loaded, being loaded or being closed."""
        with self._changed:
            return self._used()

    # Using a model

    @contextmanager
    def use(self, name: str, *, wait_s: float | None = None) -> Generator[LoadedModel]:
        """Load a model if need be and keep it loaded until the block ends; see `acquire`."""
        lease = self.acquire(name, wait_s=wait_s)
        try:
            yield lease.loaded
        finally:
            lease.release()

    def acquire(self, name: str, *, wait_s: float | None = None) -> Lease:
        """Return a lease on a model, loaded first if need be: blocks for as long as that takes.

        Callers of the same cold model share one load and its error. Room is made by unloading models without
        users, least recently used first. Raises ModelNotFoundError; MemoryPlanError when the model could not
        be loaded even alone; ModelBusyError when running models leave no room for `wait_s` seconds (None: the
        fleet's own limit); what loading raises; EngineError after `close`.
        """
        entry = self._find(name)
        plan = self._planned(entry)
        deadline = self._clock() + (self._wait_s if wait_s is None else wait_s)
        ticket = object()
        with self._changed:
            try:
                victims = self._await_turn(entry, plan, deadline, ticket)
            finally:
                self._leave_queue(ticket)
            if victims is None:
                return self._pinned(entry)
            load = entry.load = _Load()
            entry.state = _State.LOADING
            for victim in victims:
                victim.state = _State.CLOSING
        return self._load(entry, plan, load, victims)

    def wake(self, name: str, *, wait_s: float | None = None) -> None:
        """Load a model ahead of its first use; raises like `acquire`."""
        self.acquire(name, wait_s=wait_s).release()

    def sleep(self, name: str, *, wait_s: float | None = 0.0) -> None:
        """Unload a model and give its memory back; its next use loads it again.

        Raises ModelBusyError when it still has users after `wait_s` seconds (None: the fleet's own limit).
        """
        entry = self._find(name)
        deadline = self._clock() + (self._wait_s if wait_s is None else wait_s)
        with self._changed:
            while entry.state is not _State.COLD:
                if entry.state is _State.READY and not entry.pins:
                    entry.state = _State.CLOSING
                    break
                if entry.state is _State.READY:
                    users = f"has {entry.pins} user{'' if entry.pins == 1 else 's'}"
                    self._wait(deadline, f"{entry.spec.name} {users} and cannot be unloaded; try again later")
                else:
                    self._changed.wait()
            else:
                return
        self._unload([entry])

    def sweep(self) -> float | None:
        """Unload what has been idle for `idle_s`; returns the seconds until the next may be, or None."""
        if self._idle_s is None:
            return None
        with self._changed:
            now = self._clock()
            idle = [entry for entry in self._unused() if entry.last_used + self._idle_s <= now]
            for entry in idle:
                entry.state = _State.CLOSING
            left = [entry.last_used + self._idle_s - now for entry in self._unused()]
        self._unload(idle)
        return min(left, default=None)

    def close(self, *, drain: bool = False) -> None:
        """Unload everything; with `drain` wait for the users first, else their requests end. `acquire` raises
        from now on.
        """
        busy = (_State.LOADING, _State.CLOSING)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            while any(entry.state in busy or (drain and entry.pins > 0) for entry in self._entries.values()):
                self._changed.wait()
            left = [entry for entry in self._entries.values() if entry.state is _State.READY]
            for entry in left:
                entry.state = _State.CLOSING
        self._unload(left)
        if self._reaper is not None and self._reaper is not threading.current_thread():
            self._reaper.join()

    # Planning

    def _plan_all(self) -> None:
        """Plan every model so that all fit side by side where they can, else each as if it were alone."""
        budget = self.memory_bytes
        for entry in self._entries.values():
            self._try_plan(entry, budget)
        plans = [entry.plan for entry in self._entries.values() if entry.plan is not None]
        if budget is None or sum(plan.size_bytes for plan in plans) <= budget:
            return
        spare = budget - sum(plan.weight_bytes for plan in plans)
        if spare <= 0:
            return
        for entry in self._entries.values():
            if entry.plan is not None and entry.spec.context is None:
                self._try_plan(entry, entry.plan.weight_bytes + spare // len(plans))

    def _try_plan(self, entry: _Entry, memory: int | None) -> None:
        try:
            entry.plan, entry.fault = self._planner(entry.spec, memory), None
        except BiseError as error:
            if entry.plan is None:
                entry.fault = error
            logger.warning("event=model_not_planned reason=%s", error.code)

    def _planned(self, entry: _Entry) -> ModelPlan:
        """Return a model's plan; one that failed is tried again, its files may have been mended."""
        plan = entry.plan
        if plan is None:
            plan = self._planner(entry.spec, self.memory_bytes)
            with self._changed:
                entry.plan, entry.fault = plan, None
        if self.memory_bytes is not None and plan.size_bytes > self.memory_bytes:
            raise MemoryPlanError(_too_large(entry.spec.name, plan, self.memory_bytes), field="model")
        return plan

    # Under the lock

    def _find(self, name: str) -> _Entry:
        entry = self._names.get(name)
        if entry is None:
            known = ", ".join(self._entries) or "no model"
            raise ModelNotFoundError(f"'{name}' is not served here; served: {known}", field="model")
        return entry

    def _card(self, entry: _Entry) -> ModelCard:
        plan, fault = entry.plan, None if entry.fault is None else str(entry.fault)
        if plan is not None and self.memory_bytes is not None and plan.size_bytes > self.memory_bytes:
            fault = _too_large(entry.spec.name, plan, self.memory_bytes)
        return ModelCard(spec=entry.spec, plan=plan, state=entry.state.value, users=entry.pins, fault=fault)

    def _used(self) -> int:
        return sum(entry.held_bytes for entry in self._entries.values())

    def _unused(self) -> list[_Entry]:
        """Return the loaded models without users, least recently used first."""
        idle = [entry for entry in self._entries.values() if entry.state is _State.READY and not entry.pins]
        return sorted(idle, key=lambda entry: entry.last_used)

    def _await_turn(
        self, entry: _Entry, plan: ModelPlan, deadline: float, ticket: object
    ) -> Sequence[_Entry] | None:
        """Wait until a model is loaded (returns None) or the caller may load it (returns whom to unload)."""
        while True:
            if self._is_closing:
                raise EngineError("the fleet is closed")
            if entry.state is _State.READY:
                return None
            if entry.state is _State.LOADING:
                self._leave_queue(ticket)
                load = entry.load
                self._changed.wait()
                if load is not None and load.error is not None:
                    raise load.error
                continue
            if ticket not in self._queue:
                self._queue.append(ticket)
            if entry.state is _State.COLD and self._queue[0] is ticket:
                victims = self._victims(plan.size_bytes)
                if victims is not None:
                    return victims
            self._wait(
                deadline, f"{entry.spec.name} waits for memory that running models hold; try again later"
            )

    def _leave_queue(self, ticket: object) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._changed.notify_all()

    def _wait(self, deadline: float, message: str) -> None:
        left = deadline - self._clock()
        if left <= 0:
            raise ModelBusyError(message, field="model")
        self._changed.wait(left)

    def _victims(self, need: int) -> list[_Entry] | None:
        """Return whom to unload so that `need` bytes are free; None when running models are in the way."""
        if self.memory_bytes is None:
            return []
        missing = self._used() + need - self.memory_bytes
        chosen: list[_Entry] = []
        for entry in self._unused():
            if missing <= 0:
                break
            chosen.append(entry)
            missing -= entry.held_bytes
        if missing > 0:
            return None
        # A large one chosen late may make small ones chosen early unnecessary.
        for entry in reversed(chosen.copy()):
            if missing + entry.held_bytes <= 0:
                chosen.remove(entry)
                missing += entry.held_bytes
        return chosen

    def _pinned(self, entry: _Entry) -> Lease:
        assert entry.loaded is not None
        entry.pins += 1
        return Lease(entry.loaded, None, lambda: self._unpin(entry))

    # Outside the lock

    def _unpin(self, entry: _Entry) -> None:
        with self._changed:
            entry.pins -= 1
            entry.last_used = self._clock()
            self._changed.notify_all()

    def _load(self, entry: _Entry, plan: ModelPlan, load: _Load, victims: Iterable[_Entry]) -> Lease:
        try:
            self._unload(victims)
            loaded = self._loader(entry.spec, plan)
        except BaseException as error:
            failure = _as_bise_error(entry.spec.name, error)
            with self._changed:
                entry.state, entry.load, load.error = _State.COLD, None, failure
                self._changed.notify_all()
            logger.warning("event=model_load_failed reason=%s", failure.code)
            if failure is error or not isinstance(error, Exception):
                raise
            raise failure from error
        with self._changed:
            entry.loaded, entry.state, entry.load = loaded, _State.READY, None
            entry.last_used = self._clock()
            self._changed.notify_all()
            return self._pinned(entry)

    def _unload(self, entries: Iterable[_Entry]) -> None:
        """Close models in state CLOSING and count their memory as free."""
        for entry in entries:
            try:
                assert entry.loaded is not None
                entry.loaded.close()
            except Exception:  # whatever goes wrong, the others must still be closed and counted
                logger.exception("event=model_close_failed")
            finally:
                with self._changed:
                    entry.loaded, entry.state = None, _State.COLD
                    self._changed.notify_all()

    def _reap(self) -> None:
        while True:
            left = self.sweep()
            with self._changed:
                if self._is_closing:
                    return
                self._changed.wait(left)


def _as_bise_error(name: str, error: BaseException) -> BiseError:
    if isinstance(error, BiseError):
        return error
    return EngineError(f"{name} could not be loaded: {type(error).__name__}: {error}")


def _too_large(name: str, plan: ModelPlan, memory: int) -> str:
    return (
        f"{name} needs {plan.size_bytes / 2**30:.2f} GiB at a context of {plan.context} tokens, the fleet "
        f"may take {memory / 2**30:.2f} GiB; give it a smaller context or a narrower quant, or the fleet more"
    )
