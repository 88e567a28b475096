"""What routes know of keys, quotas and the ledger: two protocols, and the gate that is always open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request

    from bise.engine.request import Timings, Usage


class Ticket(Protocol):
    """The right to run one request, from admission to the row in the ledger."""

    @property
    def tenant(self) -> str:
        """Id of the key; shares of the engine and cached prefixes are kept apart by it."""
        ...

    @property
    def priority(self) -> int:
        """Lower runs first."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """`x-ratelimit-*` for the answer; empty for a key without limits."""
        ...

    @property
    def checks_input(self) -> bool:
        """True when `check_input` has rules to go by."""
        ...

    @property
    def checks_output(self) -> bool:
        """True when the answer must pass `check_output` whole before any of it is shown."""
        ...

    async def reserve(
        self, *, model: str, prompt_tokens: int, max_tokens: int, least: int | None = None
    ) -> int:
        """Book the most that this request can use, once the prompt is counted and before it is submitted;
        return how many tokens its answers may have.

        That is `max_tokens`, unless the caller named no limit: then it can do with `least` tokens or more, as
        many as the key has left. Raises RateLimitError when the key has not that much left.
        """
        ...

    def check_input(self, texts: Sequence[str]) -> None:
        """Refuse (ContentPolicyError) texts that break one of the key's guardrails, before generation."""
        ...

    def check_output(self, text: str, *, before: str = "", after: str = "") -> None:
        """Refuse (ContentPolicyError) an answer that breaks one of the key's guardrails, alone or together
        with the text that stands around it.
        """
        ...

    async def finish(
        self,
        *,
        model: str | None,
        usage: Usage | None,
        timings: Timings | None,
        finish_reason: str | None,
        error_code: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Settle and record; called exactly once, also for a request that failed or was abandoned.

        `model` is the served model's name, None where none was found. `usage` and `timings` are None when
        nothing ran. `finish_reason`: `stop`, `length`, `tool_calls`, `abort` or `error`.
        """
        ...


class Gate(Protocol):
    """Decides who may do what. Raises BiseError subclasses (AuthenticationError, PermissionDeniedError,
    RateLimitError), which become the union error body.
    """

    async def authenticate(self, request: Request) -> None:
        """Refuse a request without a good key, before its body is read. `admit` follows for those that run.

        Called for every route but /health.
        """
        ...

    async def admit(self, request: Request, *, scope: str, model: str | None) -> Ticket:
        """Check the scope (`inference`, `read` or `admin`) and the limits of the request's key, and return
        its ticket.
        """
        ...


class OpenTicket:
    """A ticket that costs nothing."""

    tenant = ""
    priority = 0
    checks_input = False
    checks_output = False

    @property
    def headers(self) -> Mapping[str, str]:
        """Nothing: there are no limits."""
        return {}

    async def reserve(
        self, *, model: str, prompt_tokens: int, max_tokens: int, least: int | None = None
    ) -> int:
        """Book nothing."""
        return max_tokens

    def check_input(self, texts: Sequence[str]) -> None:
        """Let everything pass."""

    def check_output(self, text: str, *, before: str = "", after: str = "") -> None:
        """Let everything pass."""

    async def finish(
        self,
        *,
        model: str | None,
        usage: Usage | None,
        timings: Timings | None,
        finish_reason: str | None,
        error_code: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Record nothing."""


class OpenGate:
    """Lets everyone in; for loopback without keys, and for tests."""

    async def authenticate(self, request: Request) -> None:
        """Let everyone in."""

    async def admit(self, request: Request, *, scope: str, model: str | None) -> Ticket:
        """Return a ticket that costs nothing."""
        return OpenTicket()
