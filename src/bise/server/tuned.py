"""Models that fine-tuning jobs made: each is there for the owner of its job alone (and for admins)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bise.engine.model_spec import ADAPTER_SEPARATOR
from bise.errors import ModelNotFoundError
from bise.server.gate import StoreGate

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from bise.server.ticket import Gate


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A served model and where it comes from."""

    owner: str
    job_id: str
    step: int | None = None
    """The step of a checkpoint; None for the job's result."""


class TunedModels:
    """The tuned models of one server, by full name (MODEL:ADAPTER). For one event loop."""

    def __init__(self) -> None:
        self._by_name: dict[str, TunedModel] = {}
        self.wake: Callable[[], None] = lambda: None
        """Tell the worker, if there is one, that a job was queued or changed."""

    def add(self, model: str, adapter: str, made: TunedModel) -> None:
        """Remember whose MODEL:ADAPTER is."""
        self._by_name[f"{model}{ADAPTER_SEPARATOR}{adapter}"] = made

    def remove(self, name: str) -> None:
        """Forget a model."""
        self._by_name.pop(name, None)

    def get(self, name: str) -> TunedModel | None:
        """Return what is known of a model; None for one that no job made."""
        return self._by_name.get(name)

    async def hidden_from(self, request: Request, gate: Gate) -> set[str]:
        """Return the names of the models that whoever asks must not see."""
        if not self._by_name or not isinstance(gate, StoreGate):
            return set()
        caller = await gate.caller(request)
        if caller.is_admin:
            return set()
        return {name for name, made in self._by_name.items() if made.owner != caller.owner}

    async def require(self, request: Request, gate: Gate, base: str, asked: str) -> None:
        """Refuse (ModelNotFoundError) a model that is someone else's, as if it were not there."""
        adapter = asked.partition(ADAPTER_SEPARATOR)[2]
        if adapter and f"{base}{ADAPTER_SEPARATOR}{adapter}" in await self.hidden_from(request, gate):
            raise ModelNotFoundError(f"{base} has no adapter '{adapter[:64]}'", field="model")
