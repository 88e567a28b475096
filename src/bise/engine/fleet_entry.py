"""What a fleet keeps about each of its models: its state, its users, its adapters."""

from __future__ import annotations

import ctypes
import gc
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum

from bise.engine.load import LoadedModel
from bise.engine.memory import amount
from bise.engine.model_spec import AdapterCard, AdapterSpec, ModelCard, ModelPlan, ModelSpec
from bise.errors import BiseError, EngineError

logger = logging.getLogger(__name__)


def tell_failure(event: str, name: str, error: BiseError) -> None:
    """Log why a model or an adapter cannot be had: callers hear no more than that the log knows."""
    reason = ascii(str(error))[:400]
    logger.warning("event=%s name=%s code=%s reason=%s", event, ascii(name), error.code, reason)


def load_adapter(loaded: LoadedModel, spec: AdapterSpec) -> None:
    """Load an adapter into a model; the log has what is raised."""
    try:
        loaded.load_adapter(spec.name, spec.path)
    except BiseError as error:
        tell_failure("adapter_load_failed", spec.name, error)
        raise


def close_model(loaded: LoadedModel) -> None:
    """Close a model. Raises nothing: whatever goes wrong, others must still be closed and counted."""
    try:
        loaded.close()
    except Exception:
        logger.exception("event=model_close_failed")


def give_memory_back() -> None:
    """Free what nobody can reach any more, such as a model whose engine and requests know one another, and
    give the system what the allocator keeps of it. A serving process has put what it had at its start out of
    the collector's sight (`server/serving.py`): not out of this one's.
    """
    had_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if had_frozen:
        gc.freeze()
    with suppress(AttributeError, OSError, TypeError):  # not every system's C library has it, nor need it
        ctypes.CDLL(None).malloc_trim(0)


class State(StrEnum):
    """Where a model is."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"


HASHING_SHARE = 0.2
"""Of a load that begins with reading all files for their hash: what that part counts."""


class Load:
    """One attempt to load; those who wait for it share its outcome."""

    error: BiseError | None = None
    share = 0.0
    """How much is done, 0 to 1; it never falls."""
    _begin = 0.0

    def tell(self, stage: str, share: float) -> None:
        """Take note of how far a stage is; the loading thread calls it."""
        if stage.startswith("hashing"):
            self._begin = HASHING_SHARE
            share *= HASHING_SHARE
        else:
            share = self._begin + (1 - self._begin) * share
        self.share = max(self.share, min(1.0, share))


class Attached:
    """An adapter of a model; all fields but `spec` belong to the fleet's lock."""

    def __init__(self, spec: AdapterSpec, size_bytes: int, fault: BiseError | None = None) -> None:
        self.spec = spec
        self.size_bytes = size_bytes
        self.fault = fault
        self.pins = 0
        self.is_loaded = False

    def card(self) -> AdapterCard:
        """Return what others may know."""
        return AdapterCard(
            spec=self.spec,
            size_bytes=self.size_bytes,
            is_loaded=self.is_loaded,
            users=self.pins,
            fault=None if self.fault is None else str(self.fault),
        )


class Entry:
    """A model of the fleet; all fields but `spec` and `attaching` belong to the fleet's lock."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.plan: ModelPlan | None = None
        self.fault: BiseError | None = None
        self.state = State.COLD
        self.load: Load | None = None
        self.loaded: LoadedModel | None = None
        self.pins = 0
        self.last_used = 0.0
        self.adapters: dict[str, Attached] = {}
        self.attaching = threading.Lock()
        """Held while an adapter is loaded or unloaded, so that two callers do not do it at once."""

    @property
    def full_bytes(self) -> int:
        """Bytes that the model takes once it is loaded, with all of its adapters."""
        adapters = sum(attached.size_bytes for attached in self.adapters.values())
        return adapters + (0 if self.plan is None else self.plan.size_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes that count against the budget now."""
        return 0 if self.state is State.COLD else self.full_bytes

    def too_large(self, size: int, memory_bytes: int) -> str:
        """Return what to say when a fleet with so much memory cannot hold this model of `size` bytes."""
        context = "" if self.plan is None else f" at a context of {self.plan.context} tokens"
        return (
            f"{self.spec.name} needs {amount(size)}{context}, adapters included, the fleet "
            f"may take {amount(memory_bytes)}; give it a smaller context or a narrower quant, or the "
            "fleet more"
        )

    def card(self, fault: str | None) -> ModelCard:
        """Return what others may know; `fault` says why it cannot be loaded."""
        return ModelCard(
            spec=self.spec,
            plan=self.plan,
            state=self.state.value,
            users=self.pins,
            fault=fault,
            adapters=tuple(attached.card() for attached in self.adapters.values()),
            loaded=None if self.load is None else self.load.share,
        )


def choose_victims(unused: Iterable[Entry], missing: int) -> list[Entry] | None:
    """Return whom of `unused`, in this order, to unload so that `missing` bytes come free; None when all of
    them are not enough.
    """
    chosen: list[Entry] = []
    for entry in unused:
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


def seconds_left(unused: Iterable[Entry], idle_s: float, now: float) -> float | None:
    """Return the seconds until the first of `unused` has been idle for `idle_s`; None where there is none."""
    return min((entry.last_used + idle_s - now for entry in unused), default=None)


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


def as_bise_error(name: str, error: BaseException) -> BiseError:
    """Return what to tell those who wait for a model that could not be loaded."""
    if isinstance(error, BiseError):
        return error
    return EngineError(f"{name} could not be loaded: {type(error).__name__}: {error}")
