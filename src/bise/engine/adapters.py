"""The LoRA adapters that an engine's requests may name: added and removed while it runs."""

from __future__ import annotations

import threading

from bise.errors import ConfigError, ModelNotFoundError, RequestError
from bise.model.lora import Adapter


class Adapters:
    """Adapters by name, for any thread. A request keeps the adapter it was submitted with until it ends, even
    when the name has been removed or given to another one since.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Adapter] = {}

    def add(self, name: str, adapter: Adapter) -> None:
        """Let requests name an adapter. Raises ConfigError when the name is taken by another one."""
        if not name:
            raise ConfigError("an adapter's name must have a character", field="adapter")
        with self._lock:
            known = self._by_name.setdefault(name, adapter)
        if known.sha256 != adapter.sha256:
            raise ConfigError(
                f"'{name}' is the name of another loaded adapter; remove it first or take another name",
                field="adapter",
            )

    def remove(self, name: str) -> None:
        """Refuse the name from now on; its memory is free when the last request that uses it has ended.

        Raises ModelNotFoundError.
        """
        with self._lock:
            if self._by_name.pop(name, None) is None:
                raise ModelNotFoundError(self._unknown(name), field="adapter")

    def names(self) -> tuple[str, ...]:
        """Return the names of the loaded adapters, in the order in which they came."""
        with self._lock:
            return tuple(self._by_name)

    def find(self, name: str | None) -> Adapter | None:
        """Return the adapter of a request; None for none. Raises RequestError for an unknown name."""
        if name is None:
            return None
        with self._lock:
            adapter = self._by_name.get(name)
            if adapter is None:
                raise RequestError(self._unknown(name), field="adapter")
        return adapter

    def _unknown(self, name: str) -> str:
        return f"adapter '{name}' is not loaded; loaded: {', '.join(self._by_name) or 'none'}"
