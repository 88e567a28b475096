"""POST /v1/completions: OpenAI's older form, which evaluation harnesses and editors speak."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bise.engine.request import Delta, FinishReason, TokenLogprob
from bise.engine.request import Request as EngineRequest
from bise.errors import RequestError
from bise.server.body import read_json
from bise.server.chat import usage_body
from bise.server.hosted_text import complete_elsewhere
from bise.server.limits import MAX_SEQUENCES
from bise.server.logprobs import FLOOR, plain_name
from bise.server.openapi import documented
from bise.server.prompts import Prompt, fim_prompt, prompts_of
from bise.server.receipts import late_receipt_field, receipt_field
from bise.server.service import Job, Service
from bise.server.sse import DONE, EventStream, event
from bise.server.text_schema import CompletionRequest
from bise.text.tokenizer import Tokenizer

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", **documented(CompletionRequest, "Continue a text.", streams=True))
async def create_completion(request: Request) -> Response:
    """Continue a text."""
    service: Service = request.app.state.service
    body = await read_json(request, CompletionRequest)
    if (client := service.hosted.get(body.model)) is not None:
        return await complete_elsewhere(service, request, client, body)
    job = await service.open(request, model=body.model)
    try:
        prompts, requests = await job.plan(_plan, body)
        answer = CompletionAnswer(job, body, prompts)
        per_prompt = len(requests) // len(prompts)
        owners = [index // per_prompt for index in range(len(requests))]
        await job.start(requests, prompts=owners, receipt=body.receipt)
        if body.stream:
            return EventStream(job, answer.events(), finish_reason=answer.finish_reason)
        return await answer.whole()
    except BaseException as error:
        await job.finish(None, error)
        raise


def _plan(job: Job, body: CompletionRequest) -> tuple[list[Prompt], list[EngineRequest]]:
    if body.suffix:
        assert isinstance(body.prompt, str)
        prompts = [fim_prompt(job, body.prompt, body.suffix)]
    else:
        prompts = prompts_of(job, body.prompt, "prompt", may_shorten=body.truncate is not None)
    candidates = body.best_of or body.n or 1
    if len(prompts) * candidates > MAX_SEQUENCES:
        raise RequestError(
            f"{len(prompts)} prompts with {candidates} choices each make more than {MAX_SEQUENCES} "
            "sequences; send several requests",
            field="prompt",
        )
    job.ticket.check_input([*(prompt.text for prompt in prompts), body.suffix or ""])
    job.around = lambda index, text: (prompts[index // candidates].text, text, body.suffix or "")
    logprobs = body.logprobs
    if candidates > (body.n or 1):
        logprobs = logprobs or 0
    return prompts, [
        EngineRequest(
            token_ids=prompt.token_ids,
            params=body.params(
                temperature=job.loaded.temperature,
                max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=logprobs,
                choice=choice,
            ),
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            continuation=bool(prompt.text),
            truncate=body.truncate,
            truncate_keep=_num_kept(job, prompt) if body.truncate else 0,
            **body.run_options,
        )
        for prompt in prompts
        for choice in range(candidates)
    ]


def _num_kept(job: Job, prompt: Prompt) -> int:
    """Return how many leading tokens of a prompt that is shortened stay: BOS."""
    return int(prompt.token_ids[0] == job.loaded.tokenizer.bos_id)


class CompletionAnswer:
    """One completion on its way."""

    def __init__(self, job: Job, body: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        self._job = job
        self._body = body
        self._prompts = prompts
        self._shown = body.n or 1
        self._candidates = body.best_of or self._shown
        self._tokenizer = job.loaded.tokenizer
        self._reason: str | None = None
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def finish_reason(self) -> str | None:
        """Return how it ended, for the ledger."""
        return self._reason

    async def whole(self) -> Response:
        """Wait for the end and return the completion."""
        answers = await self._job.collect()
        response = await self._job.render(lambda: self._completion(answers))
        await self._job.finish(self._reason)
        return response

    def _completion(self, answers: Sequence[Delta]) -> dict[str, object]:
        choices: list[dict[str, object]] = []
        generation = self._job.generation
        assert generation is not None
        for number, prompt in enumerate(self._prompts):
            own = range(number * self._candidates, (number + 1) * self._candidates)
            if self._candidates > self._shown:
                best = sorted(own, key=lambda place: _mean_logprob(answers[place]), reverse=True)
                own = best[: self._shown]
            for place in own:
                choice = self._choice(len(choices), prompt, answers[place])
                choices.append(choice | receipt_field(generation, place))
        return {
            **self._head(),
            "choices": choices,
            "usage": usage_body(generation.usage()),
            "seed": generation.seeds[0],
        }

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks, usage once, [DONE]."""
        generation = self._job.generation
        assert generation is not None
        left = len(self._prompts) * self._shown
        offsets = [0] * left
        begun = [False] * left
        async for index, delta in self._job.deltas():
            prompt = self._prompts[index // self._shown]
            text, logprobs = delta.text, None
            if not begun[index] and self._body.echo:
                text = prompt.text + text
            if self._body.logprobs is not None:
                logprobs = self._logprobs(prompt, delta, offsets[index])
                offsets[index] += self._width(delta)
            begun[index] = True
            reason = None if delta.finish_reason is None else _reason(delta)
            left -= reason is not None
            self._reason = reason or self._reason
            receipt = await late_receipt_field(self._job, index) if reason else {}
            if text or reason or logprobs:
                yield self._chunk(index, text, reason, {"logprobs": logprobs, **receipt}, is_last=not left)
        if self._body.wants_usage_chunk:
            yield event({**self._head(), "choices": [], "usage": usage_body(generation.usage())})
        yield DONE

    def _chunk(
        self,
        index: int,
        text: str,
        reason: str | None,
        extra: dict[str, object],
        *,
        is_last: bool,
    ) -> bytes:
        choice = {"index": index, "text": text, **extra, "finish_reason": reason}
        chunk: dict[str, object] = {**self._head(), "choices": [choice]}
        generation = self._job.generation
        assert generation is not None
        if self._body.wants_usage_chunk:
            chunk["usage"] = None
        elif is_last and reason and self._body.wants_usage_chunk is None:
            chunk["usage"] = usage_body(generation.usage())
        return event(chunk)

    def _choice(self, index: int, prompt: Prompt, answer: Delta) -> dict[str, object]:
        reason = _reason(answer)
        self._reason = self._reason or reason
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs(prompt, answer, 0)
        text = prompt.text + answer.text if self._body.echo else answer.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _width(self, delta: Delta) -> int:
        """Return how many characters the scored tokens of a delta have."""
        entries = (*delta.prompt_logprobs, *delta.logprobs)
        return sum(_chars(self._tokenizer, entry.token_id) for entry in entries if entry is not None)

    def _logprobs(self, prompt: Prompt, delta: Delta, offset: int) -> dict[str, object]:
        entries: list[TokenLogprob | None] = [*delta.prompt_logprobs, *delta.logprobs]
        return legacy_logprobs(
            self._tokenizer,
            entries,
            first=prompt.token_ids[0],
            rivals=self._body.logprobs or 0,
            offset=offset,
        )

    def _head(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._job.model,
        }


def legacy_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[TokenLogprob | None],
    *,
    first: int,
    rivals: int,
    offset: int,
) -> dict[str, object]:
    """Return OpenAI's older form: four lists side by side.

    `first` is the token whose entry is None, the prompt's first one. `offset`: characters shown before.
    """
    ids = [first if entry is None else entry.token_id for entry in entries]
    names = [plain_name(tokenizer, token_id) for token_id in ids]
    widths = [_chars(tokenizer, token_id) for token_id in ids]
    starts = list(accumulate(widths, initial=offset))[:-1]
    tops = [
        None
        if entry is None
        else {plain_name(tokenizer, token_id): max(value, FLOOR) for token_id, value in entry.top[:rivals]}
        for entry in entries
    ]
    return {
        "tokens": names,
        "token_logprobs": [None if entry is None else max(entry.logprob, FLOOR) for entry in entries],
        "top_logprobs": tops,
        "text_offset": starts,
        "token_ids": ids,
    }


def _chars(tokenizer: Tokenizer, token_id: int) -> int:
    return len(tokenizer.token_bytes(token_id).decode("utf-8", "ignore"))


def _reason(delta: Delta) -> str:
    return "stop" if delta.finish_reason is FinishReason.STOP else "length"


def _mean_logprob(answer: Delta) -> float:
    values = [entry.logprob for entry in answer.logprobs]
    return sum(values) / len(values) if values else float("-inf")
