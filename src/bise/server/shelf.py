"""Where finished responses are kept: in the database, or in memory for a server that has none."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from bise.errors import NotFoundError
from bise.store.responses import StoredResponse

if TYPE_CHECKING:
    from bise.server.gate import StoreGate

MAX_IN_MEMORY = 1000


class Shelf(Protocol):
    """Keeps finished responses, each for the tenant that made it only."""

    async def put(self, tenant: str, response: StoredResponse) -> None:
        """Keep a response."""
        ...

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response. Raises NotFoundError when it is gone, unknown or another tenant's."""
        ...

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response. Raises NotFoundError as `get` does."""
        ...


class StoreShelf:
    """The database's responses; see `bise.store.responses`."""

    def __init__(self, gate: StoreGate) -> None:
        self._gate = gate

    async def put(self, tenant: str, response: StoredResponse) -> None:
        """Keep a response."""
        await self._gate.offload(self._gate.store.responses.put, tenant, response)

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response."""
        return await self._gate.offload(self._gate.store.responses.get, tenant, response_id)

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response."""
        await self._gate.offload(self._gate.store.responses.delete, tenant, response_id)


class MemoryShelf:
    """The newest responses of a server without a database."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()

    async def put(self, tenant: str, response: StoredResponse) -> None:
        """Keep a response; the oldest makes room."""
        self._kept[tenant, response.body["id"]] = response
        if len(self._kept) > MAX_IN_MEMORY:
            self._kept.popitem(last=False)

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response."""
        found = self._kept.get((tenant, response_id))
        if found is None:
            raise NotFoundError("there is no such response", field="response_id")
        return found

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response."""
        await self.get(tenant, response_id)
        del self._kept[tenant, response_id]
