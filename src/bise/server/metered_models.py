"""The assistant's models with a row in the ledger for every answer, so that its tokens are counted too."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from bise.assistant.models import ChatModels, ChatTurn, Job, ModelFacts, Piece
from bise.engine.request import Timings, Usage
from bise.errors import BiseError
from bise.server.access import LOCAL_OWNER
from bise.store.ledger import LedgerRow

if TYPE_CHECKING:
    from bise.server.gate import StoreGate

ENDPOINT = "assistant"


class MeteredModels:
    """Passes everything on and writes down what answers used."""

    def __init__(self, models: ChatModels, gate: StoreGate) -> None:
        self._models = models
        self._gate = gate

    def facts(self) -> Sequence[ModelFacts]:
        """Return what is served."""
        return self._models.facts()

    async def count(self, model: str, messages: Sequence[ChatTurn], *, continues: bool = False) -> int:
        """Return the number of prompt tokens of a conversation."""
        return await self._models.count(model, messages, continues=continues)

    async def count_text(self, model: str, text: str) -> int:
        """Return the number of tokens of a text alone."""
        return await self._models.count_text(model, text)

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer; however it ends, its row is written."""
        share = self._gate.begin_share()
        meter = _Meter()
        error_code: str | None = None
        try:
            async with aclosing(self._models.stream(job)) as pieces:
                async for piece in pieces:
                    meter.add(piece)
                    yield piece
        except BiseError as error:
            error_code = error.code
            raise
        finally:
            row = meter.row(job, error_code)
            await self._gate.offload(self._gate.record, row, None, share)


class _Meter:
    """Counts an answer, also one that ends before the engine could sum it up."""

    def __init__(self) -> None:
        self._prompt = self._completion = 0
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Count one piece."""
        if piece.prefill is not None:
            self._prompt = piece.prefill[1]
        self._completion += piece.tokens
        self._usage = piece.usage or self._usage
        self._timings = piece.timings or self._timings
        self._finish_reason = piece.finish_reason or self._finish_reason

    def row(self, job: Job, error_code: str | None) -> LedgerRow:
        """Return the row of the answer."""
        usage = self._usage or Usage(
            prompt_tokens=self._prompt, cached_tokens=0, completion_tokens=self._completion
        )
        timings = self._timings or Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0)
        return LedgerRow(
            request_id=f"run_{secrets.token_hex(12)}",
            key_id=None,
            owner=job.tenant or LOCAL_OWNER,
            endpoint=ENDPOINT,
            model=job.model,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            decode_s=timings.decode_s,
            finish_reason=self._finish_reason or ("error" if error_code else "abort"),
            error_code=error_code,
        )
