"""Several models in one process under one memory budget: loaded on demand, unloaded when idle or when another
needs the room, never while someone uses them.

Every model has a plan (engine/model_spec.py), so its size is known before it is loaded: the sum of the plans
of what is loaded stays within the budget. Thread-safe; loading and closing happen outside the lock, in the
thread of whoever asked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

from bise.engine.fleet_entry import (
    Attached,
    Entry,
    Lease,
    Load,
    State,
    as_bise_error,
    choose_victims,
    close_model,
    give_memory_back,
    load_adapter,
    seconds_left,
    tell_failure,
)
from bise.engine.load import LoadedModel, Progress
from bise.engine.memory import available_memory
from bise.engine.model_spec import (
    ADAPTER_SEPARATOR,
    AdapterSpec,
    ModelCard,
    ModelPlan,
    ModelSpec,
    adapter_bytes,
    load_planned,
    plan_model,
)
from bise.errors import (
    BiseError,
    ConfigError,
    ConflictError,
    EngineError,
    MemoryPlanError,
    ModelBusyError,
    ModelNotFoundError,
)

Planner = Callable[[ModelSpec, int | None], ModelPlan]
Loader = Callable[[ModelSpec, ModelPlan, Progress], LoadedModel]
AdapterSizer = Callable[[ModelSpec, Path], int]


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
        adapter_sizer: AdapterSizer = adapter_bytes,
        collect: Callable[[], None] = give_memory_back,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Plan `specs` within `memory_bytes` beyond the process itself (None: what is free now).

        A model without users for `idle_s` seconds is unloaded (None: only when another needs the room).
        Whoever needs the room of models in use waits `wait_s` seconds unless told otherwise. A model whose
        files are bad shows it in its card. `collect` frees what an unloaded model left. Loads nothing. Raises
        ConfigError when two models share a name.
        """
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, Entry] = {}
        for spec in specs:
            self._entries[spec.name] = entry = Entry(spec)
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
        self._adapter_sizer = adapter_sizer
        self._collect = collect
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        """Those who wait for room, in order of arrival; nobody overtakes the first."""
        self._is_closing = False
        for entry in self._entries.values():
            entry.adapters = {adapter.name: self._attached(entry, adapter) for adapter in entry.spec.adapters}
        self._plan_all()
        self._reaper: threading.Thread | None = None
        if idle_s is not None:
            self._reaper = threading.Thread(target=self._reap, args=(idle_s,), name="bise-fleet", daemon=True)
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
            return self._card(self._find(name)[0])

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

        MODEL:ADAPTER names one of the model's adapters too, which is loaded with it; the lease tells what to
        put into `Request.adapter`. Callers of the same cold model share one load and its error. Room is made
        by unloading models without users, least recently used first. Raises ModelNotFoundError;
        MemoryPlanError when the model could not be loaded even alone; ModelBusyError when running models
        leave no room for `wait_s` seconds (None: the fleet's own limit); what loading raises; EngineError
        after `close`.
        """
        entry, adapter = self._find(name)
        plan = self._planned(entry)
        deadline = self._clock() + (self._wait_s if wait_s is None else wait_s)
        ticket, load = object(), Load()
        with self._changed:
            try:
                victims = self._await_turn(entry, deadline, ticket)
            finally:
                self._leave_queue(ticket)
            if victims is None:
                entry.pins += 1
            else:
                entry.state, entry.load = State.LOADING, load
                for victim in victims:
                    victim.state = State.CLOSING
        if victims is not None:
            self._load(entry, plan, load, victims)
        return self._leased(entry, adapter)

    def acquire_loaded(self, name: str) -> Lease | None:
        """Return a lease on a model that is loaded, at once; None where `acquire` might take time."""
        entry, adapter = self._find(name)
        with self._changed:
            if self._is_closing or entry.state is not State.READY or adapter is not None:
                return None
            entry.pins += 1
        return self._leased(entry, None)

    def wake(self, name: str, *, wait_s: float | None = None) -> None:
        """Load a model ahead of its first use; raises like `acquire`."""
        self.acquire(name, wait_s=wait_s).release()

    def sleep(self, name: str, *, wait_s: float | None = 0.0) -> None:
        """Unload a model and give its memory back; its next use loads it again.

        Raises ModelBusyError when it still has users after `wait_s` seconds (None: the fleet's own limit).
        """
        entry, _ = self._find(name)
        deadline = self._clock() + (self._wait_s if wait_s is None else wait_s)
        with self._changed:
            while entry.state is not State.COLD:
                if entry.state is State.READY and not entry.pins:
                    entry.state = State.CLOSING
                    break
                if entry.state is State.READY:
                    users = f"has {entry.pins} user{'' if entry.pins == 1 else 's'}"
                    self._wait(deadline, f"{entry.spec.name} {users} and cannot be unloaded; try again later")
                else:
                    self._changed.wait()
            else:
                return
        self._unload([entry])

    def add_adapter(self, model: str, name: str, path: Path, *, at_once: bool = False) -> None:
        """Serve the LoRA adapter in directory `path` as MODEL:NAME from now on. Its first use loads it; with
        `at_once` this call does, its model first if need be, and tells whatever is wrong with it.

        Raises ModelNotFoundError, ConflictError for a name that is taken, ModelFileError for an adapter that
        is damaged or made for another model, MemoryPlanError or ModelBusyError when there is no room for it.
        """
        with self.use(model) if at_once else nullcontext() as loaded:
            self._add_adapter(self._find(model)[0], AdapterSpec(name=name, path=path), loaded)

    def remove_adapter(self, model: str, name: str) -> None:
        """Serve MODEL:NAME no more, and give its memory back.

        Raises ModelNotFoundError; ModelBusyError while someone uses it.
        """
        entry, _ = self._find(model)
        with entry.attaching, self._changed:
            attached = self._find(f"{model}{ADAPTER_SEPARATOR}{name}")[0].adapters[name]
            if attached.pins:
                raise ModelBusyError(f"{model}:{name} is in use; try again later", field="name")
            del entry.adapters[name]
            if attached.is_loaded and entry.loaded is not None:
                entry.loaded.unload_adapter(name)
            self._changed.notify_all()

    def sweep(self) -> float | None:
        """Unload what has been idle for `idle_s`; returns the seconds until the next may be, or None."""
        if self._idle_s is None:
            return None
        with self._changed:
            idle = [entry for entry in self._unused() if entry.last_used + self._idle_s <= self._clock()]
            for entry in idle:
                entry.state = State.CLOSING
        self._unload(idle)
        with self._changed:
            return seconds_left(self._unused(), self._idle_s, self._clock())

    def close(self, *, drain: bool = False) -> None:
        """Unload everything; with `drain` wait for the users first, else their requests end. `acquire` raises
        from now on.
        """
        busy = (State.LOADING, State.CLOSING)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            while any(entry.state in busy or (drain and entry.pins > 0) for entry in self._entries.values()):
                self._changed.wait()
            left = [entry for entry in self._entries.values() if entry.state is State.READY]
            for entry in left:
                entry.state = State.CLOSING
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

    def _try_plan(self, entry: Entry, memory: int | None) -> None:
        try:
            entry.plan, entry.fault = self._planner(entry.spec, memory), None
        except BiseError as error:
            if entry.plan is None:
                entry.fault = error
            tell_failure("model_not_planned", entry.spec.name, error)

    def _planned(self, entry: Entry) -> ModelPlan:
        """Return a model's plan; one that failed is tried again, its files may have been mended."""
        plan = entry.plan
        if plan is None:
            plan = self._planner(entry.spec, self.memory_bytes)
            with self._changed:
                entry.plan, entry.fault = plan, None
        self._check_size(entry, entry.full_bytes)
        return plan

    def _check_size(self, entry: Entry, size: int) -> None:
        """Raise MemoryPlanError when a model of `size` bytes could not be loaded even alone."""
        if self.memory_bytes is not None and size > self.memory_bytes:
            raise MemoryPlanError(entry.too_large(size, self.memory_bytes), field="model")

    def _attached(self, entry: Entry, adapter: AdapterSpec) -> Attached:
        try:
            return Attached(adapter, self._adapter_sizer(entry.spec, adapter.path))
        except BiseError as error:  # a bad adapter does not keep its model from being served
            tell_failure("adapter_not_planned", f"{entry.spec.name}:{adapter.name}", error)
            return Attached(adapter, 0, error)

    # Under the lock

    def _find(self, name: str) -> tuple[Entry, str | None]:
        """Return the model and the adapter that a name means; raises ModelNotFoundError."""
        model, separator, adapter = name.partition(ADAPTER_SEPARATOR)
        with self._changed:
            entry = self._names.get(model)
            if entry is None:
                known = ", ".join(self._entries) or "no model"
                raise ModelNotFoundError(f"'{model}' is not served here; served: {known}", field="model")
            if separator and adapter not in entry.adapters:
                known = ", ".join(entry.adapters) or "none"
                raise ModelNotFoundError(
                    f"{model} has no adapter '{adapter}'; it has: {known}", field="model"
                )
        return entry, adapter if separator else None

    def _card(self, entry: Entry) -> ModelCard:
        fault = None if entry.fault is None else str(entry.fault)
        size = entry.full_bytes
        if entry.plan is not None and self.memory_bytes is not None and size > self.memory_bytes:
            fault = entry.too_large(size, self.memory_bytes)
        return entry.card(fault)

    def _used(self) -> int:
        return sum(entry.held_bytes for entry in self._entries.values())

    def _unused(self) -> list[Entry]:
        """Return the loaded models without users, least recently used first."""
        idle = [entry for entry in self._entries.values() if entry.state is State.READY and not entry.pins]
        return sorted(idle, key=lambda entry: entry.last_used)

    def _await_turn(self, entry: Entry, deadline: float, ticket: object) -> Sequence[Entry] | None:
        """Wait until a model is loaded (returns None) or the caller may load it (returns whom to unload)."""
        while True:
            if self._is_closing:
                raise EngineError("the fleet is closed")
            if entry.state is State.READY:
                return None
            if entry.state is State.LOADING:
                self._leave_queue(ticket)
                load = entry.load
                self._changed.wait()
                if load is not None and load.error is not None:
                    raise load.error
                continue
            if ticket not in self._queue:
                self._queue.append(ticket)
            if entry.state is State.COLD and self._queue[0] is ticket:
                victims = self._victims(entry.full_bytes, entry)
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

    def _victims(self, need: int, keep: Entry) -> list[Entry] | None:
        """Return whom but `keep` to unload for `need` bytes; None when running models are in the way."""
        if self.memory_bytes is None:
            return []
        others = [entry for entry in self._unused() if entry is not keep]
        return choose_victims(others, self._used() + need - self.memory_bytes)

    # Outside the lock

    def _leased(self, entry: Entry, adapter: str | None) -> Lease:
        """Return a lease on a model that the caller has pinned, its adapter loaded into it."""
        attached: Attached | None = None
        try:
            with self._changed:
                loaded = entry.loaded
                if loaded is None:
                    raise EngineError("the fleet is closed")
                if adapter is not None:
                    self._find(f"{entry.spec.name}{ADAPTER_SEPARATOR}{adapter}")  # it may be gone by now
                    attached = entry.adapters[adapter]
                    attached.pins += 1
            if attached is not None:
                self._attach(entry, loaded, attached)
        except BaseException:
            self._unpin(entry, attached)
            raise
        return Lease(loaded, adapter, lambda: self._unpin(entry, attached))

    def _add_adapter(self, entry: Entry, spec: AdapterSpec, loaded: LoadedModel | None) -> None:
        """Take an adapter in; into `loaded` at once, where the caller holds its model."""
        name, size = spec.name, self._adapter_sizer(entry.spec, spec.path)
        full_name = f"{entry.spec.name}:{name}"
        with entry.attaching:  # nobody can use it before its room is free
            with self._changed:
                if name in entry.adapters:
                    raise ConflictError(f"{full_name} is there already; remove it first", field="name")
                self._check_size(entry, entry.full_bytes + size)
                victims = [] if entry.state is State.COLD else self._victims(size, entry)
                if victims is None:
                    raise ModelBusyError(f"running models leave no room for {full_name}", field="name")
                attached = entry.adapters[name] = Attached(spec, size)
                for victim in victims:
                    victim.state = State.CLOSING
            self._unload(victims)
            try:
                if loaded is not None:
                    self._load_adapter(loaded, attached)
            except BaseException:
                with self._changed:
                    del entry.adapters[name]
                    self._changed.notify_all()
                raise

    def _attach(self, entry: Entry, loaded: LoadedModel, attached: Attached) -> None:
        if attached.fault is not None:
            raise attached.fault
        with entry.attaching:
            self._find(f"{entry.spec.name}:{attached.spec.name}")  # `add_adapter` may have failed meanwhile
            if not attached.is_loaded:
                self._load_adapter(loaded, attached)

    def _load_adapter(self, loaded: LoadedModel, attached: Attached) -> None:
        load_adapter(loaded, attached.spec)
        with self._changed:
            attached.is_loaded = True

    def _unpin(self, entry: Entry, attached: Attached | None) -> None:
        with self._changed:
            if attached is not None:
                attached.pins -= 1
            entry.pins -= 1
            entry.last_used = self._clock()
            self._changed.notify_all()

    def _load(self, entry: Entry, plan: ModelPlan, load: Load, victims: Iterable[Entry]) -> None:
        """Unload the victims and load the model, pinned once for the caller."""
        try:
            self._unload(victims)
            loaded = self._loader(entry.spec, plan, load.tell)
        except BaseException as error:
            failure = as_bise_error(entry.spec.name, error)
            with self._changed:
                entry.state, entry.load, load.error = State.COLD, None, failure
                self._changed.notify_all()
            tell_failure("model_load_failed", entry.spec.name, failure)
            if failure is error or not isinstance(error, Exception):
                raise
            raise failure from error
        with self._changed:
            entry.loaded, entry.state, entry.load = loaded, State.READY, None
            entry.pins += 1
            entry.last_used = self._clock()
            self._changed.notify_all()

    def _unload(self, entries: Iterable[Entry]) -> None:
        """Close models in state CLOSING and count their memory as free."""
        for entry in entries:
            assert entry.loaded is not None
            try:
                close_model(entry.loaded)
            finally:
                with self._changed:
                    entry.loaded = None
                self._collect()
                with self._changed:
                    entry.state = State.COLD
                    for attached in entry.adapters.values():
                        attached.is_loaded = False
                    self._changed.notify_all()

    def _reap(self, idle_s: float) -> None:
        while not self._is_closing:
            self.sweep()
            with self._changed:
                if not self._is_closing:  # looked at again: what changed since the sweep woke nobody
                    self._changed.wait(seconds_left(self._unused(), idle_s, self._clock()))
