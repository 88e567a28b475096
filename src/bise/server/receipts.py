"""Receipts of answers over HTTP: what `bise generate --receipt` writes, as a field of every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bise.engine.receipt import adapter_identity, make_receipt, receipt_body, receipt_params
from bise.engine.request import Delta, FinishReason, Request, TokenLogprob
from bise.errors import RequestError

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.server.generation import Generation
    from bise.server.service import Job


class Receipts:
    """What vouches for the answers of one request."""

    def __init__(self, loaded: LoadedModel, requests: Sequence[Request]) -> None:
        """Vouch for the answers to `requests`, as the engine would run them. Raises RequestError when a model
        or a request cannot have receipts.
        """
        if not loaded.placement.is_native:
            raise RequestError(
                "receipt: is for bise's own kernels on the processor; this model runs on "
                f"{loaded.placement.device}",
                field="receipt",
            )
        if any(request.params.max_tokens == 0 for request in requests):
            raise RequestError(
                "receipt: vouches for an answer, and max_tokens 0 leaves none", field="receipt"
            )
        room = loaded.engine.max_context
        self.requests = [
            replace(request, params=receipt_params(request.params, room - len(request.token_ids)))
            for request in requests
        ]
        """The requests with the log-probs that receipts cover; submit these."""
        self._loaded = loaded
        self._adapter = adapter_identity(loaded, requests[0].adapter)
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        self._reasons: list[FinishReason | None] = [None] * len(requests)

    def take(self, index: int, delta: Delta) -> None:
        """Note what came of an answer."""
        self._logprobs[index] += delta.logprobs
        self._reasons[index] = delta.finish_reason

    def body(self, index: int, seed: int) -> dict[str, Any]:
        """Return the receipt of an answer that has ended, drawn with `seed`: what a receipt's file holds."""
        request, reason = self.requests[index], self._reasons[index]
        assert reason is not None
        drawn = replace(request, params=replace(request.params, seed=seed))
        made = make_receipt(self._loaded, drawn, self._logprobs[index], reason.value, adapter=self._adapter)
        return receipt_body(made)


def receipt_field(generation: Generation, index: int) -> dict[str, object]:
    """Return the field `receipt` of a sequence that has ended, and no field where none was asked for.

    The first receipt of a model reads its files: on the event loop call `late_receipt_field`.
    """
    if generation.receipts is None:
        return {}
    return {"receipt": generation.receipts.body(index, generation.seeds[index])}


async def late_receipt_field(job: Job, index: int) -> dict[str, object]:
    """Return `receipt_field` of a job's sequence, made in a thread where there is one to make."""
    generation = job.generation
    if generation is None or generation.receipts is None:
        return {}
    return await job.service.offload(receipt_field, generation, index)
