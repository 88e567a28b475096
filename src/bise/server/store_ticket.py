"""One admitted request over the store: what it may use, which rules its texts must keep, its row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bise.errors import ContentPolicyError, RateLimitError
from bise.store.limits import counts_tokens

if TYPE_CHECKING:
    from bise.engine.request import Timings, Usage
    from bise.server.access import Caller
    from bise.server.gate import StoreGate
    from bise.store.ledger import LedgerRow
    from bise.store.limits import Allowance, Reservation
    from bise.store.rules import Guard

BACKGROUND_PRIORITY = 1000
"""Added to the priority of batch work: every interactive request runs before it."""


@dataclass(slots=True, kw_only=True)
class StoreTicket:
    """The right to run one request; see `bise.server.ticket.Ticket`."""

    gate: StoreGate
    share: str
    caller: Caller
    reservation: Reservation | None
    guard: Guard | None
    draft: LedgerRow
    row: LedgerRow | None = None
    """What the ledger was told at the end, with its costs."""
    _rule: str | None = None
    _headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def tenant(self) -> str:
        """Id of the key, or the owner where there is none."""
        return self.caller.key_id or self.caller.owner

    @property
    def priority(self) -> int:
        """The key's priority; background work comes after everything else."""
        priority = 0 if self.caller.key is None else self.caller.key.limits.priority
        return priority + BACKGROUND_PRIORITY if self.caller.is_background else priority

    @property
    def headers(self) -> Mapping[str, str]:
        """The key's limits and what is left of them."""
        return {} if self.reservation is None else rate_headers(self.reservation)

    @property
    def checks_input(self) -> bool:
        """True when the key has guardrails."""
        return self.guard is not None

    @property
    def checks_output(self) -> bool:
        """True when the key has rules for answers."""
        return self.guard is not None and self.guard.watches_output

    async def reserve(
        self, *, model: str, prompt_tokens: int, max_tokens: int, least: int | None = None
    ) -> int:
        """Book the most that the request can use; return how many tokens its answer may have."""
        if self.reservation is None or self.caller.key is None:
            return max_tokens
        held, key = self.reservation, self.caller.key
        if not counts_tokens(key.limits):
            self.reservation = replace(held, booked=prompt_tokens + max_tokens)
            return max_tokens
        try:
            self.reservation = await self.gate.offload_for(
                key.id, self.gate.extend, held, key, model, prompt_tokens, max_tokens, least
            )
        except RateLimitError:
            self.reservation = None  # the place is given up
            raise
        return self.reservation.booked - prompt_tokens

    def check_input(self, texts: Sequence[str]) -> None:
        """Refuse prompts that break a rule."""
        if self.guard is not None:
            self._refuse(self.guard.broken_rule(texts, "input"), "prompt")

    def check_output(self, text: str, *, before: str = "", after: str = "") -> None:
        """Refuse an answer that breaks a rule, alone or together with the text around it."""
        if self.guard is None:
            return
        rule = self.guard.broken_between(before, text, after)
        if rule is None and "\\" in text:  # JSON may spell any character as an escape
            rule = self.guard.broken_rule([_unescaped(text)], "output")
        self._refuse(rule, "answer")

    def _refuse(self, rule: str | None, what: str) -> None:
        if rule is not None:
            self._rule = rule
            raise ContentPolicyError(f"the {what} breaks this key's guardrail '{rule}'")

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
        """Settle and record, once."""
        fields: dict[str, Any] = {"model": model or "", "adapter": adapter, "rule": self._rule}
        if usage is not None:
            names = ("prompt_tokens", "cached_tokens", "completion_tokens")
            fields |= {name: getattr(usage, name) for name in names}
        if timings is not None:
            fields |= {name: getattr(timings, name) for name in ("queue_s", "prefill_s", "decode_s")}
        row = replace(self.draft, finish_reason=finish_reason, error_code=error_code, **fields)
        self.row = await self.gate.offload(self.gate.record, row, self.reservation, self.share)


def rate_headers(reservation: Reservation) -> dict[str, str]:
    """Return the `x-ratelimit` headers as OpenAI and Mistral write them."""
    headers: dict[str, str] = {}
    for what, allowance in (("requests", reservation.requests), ("tokens", reservation.tokens)):
        if allowance is not None:
            headers |= _allowance_headers(what, allowance)
    return headers


def _allowance_headers(what: str, allowance: Allowance) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(allowance.limit),
        f"x-ratelimit-remaining-{what}": str(allowance.remaining),
        f"x-ratelimit-reset-{what}": f"{allowance.reset_s:.3f}s",
        f"x-ratelimit-limit-{what}-minute": str(allowance.limit),
        f"x-ratelimit-remaining-{what}-minute": str(allowance.remaining),
    }


_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


def _unescaped(text: str) -> str:
    """Return a text with JSON's escapes resolved."""

    def character(match: re.Match[str]) -> str:
        name = match[1]
        return chr(int(name[1:], 16)) if len(name) == 5 else _ESCAPED.get(name, name)

    # Escapes of two surrogates make one character.
    return _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
