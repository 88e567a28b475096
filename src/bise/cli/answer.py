"""One answer as it streams in: text to the screen, everything else gathered for the report after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bise.engine.handle import RequestHandle
    from bise.engine.load import LoadedModel
    from bise.engine.request import Delta, Request, TokenLogprob


@dataclass(slots=True)
class Answer:
    """What a request brought; filled while it streams."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list["TokenLogprob"])
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list["TokenLogprob | None"])
    last: Delta | None = None
    """The closing delta: finish reason, usage, timings."""

    def add(self, delta: Delta) -> None:
        """Take one delta in; raise its error, if it carries one."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.last = delta
        if delta.error is not None:
            raise delta.error

    @property
    def finish_reason(self) -> str:
        """Why it ended: stop, length, abort or error."""
        return (
            "abort" if self.last is None or self.last.finish_reason is None else self.last.finish_reason.value
        )

    def speed_line(self, context: int) -> str:
        """Return `12 tokens · 85.3 tok/s · first token after 0.04 s · 134 of 2048 context`."""
        count = len(self.token_ids)
        parts = [f"{count} token{'' if count == 1 else 's'}"]
        timings, usage = (self.last.timings, self.last.usage) if self.last else (None, None)
        if timings is not None and count:
            # The first token is the prefill's; decoding took the rest.
            if count > 1 and timings.decode_s > 0:
                parts.append(f"{(count - 1) / timings.decode_s:.1f} tok/s")
            parts.append(f"first token after {timings.queue_s + timings.prefill_s:.2f} s")
        if usage is not None:
            parts.append(f"{usage.prompt_tokens + usage.completion_tokens} of {context} context")
        return " · ".join(parts)

    def report(self) -> dict[str, Any]:
        """Return the JSON fields that every answer has: finish_reason, usage, timings (seconds)."""
        usage = self.last.usage if self.last else None
        timings = self.last.timings if self.last else None
        return {
            "finish_reason": self.finish_reason,
            "stop_match": self.last.stop_match if self.last else None,
            "usage": usage
            and {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            "timings": timings
            and {"queue_s": timings.queue_s, "prefill_s": timings.prefill_s, "decode_s": timings.decode_s},
        }


def ask(loaded: LoadedModel, request: Request, on_text: Callable[[str], None]) -> Answer:
    """Run a request to its end and return the answer, calling `on_text` with each piece of text as it comes.

    Ctrl-C, and any failure of `on_text`, end the request before the exception goes on.
    """
    answer = Answer()
    _follow(loaded.engine.submit(request), answer, on_text)
    return answer


def ask_until_interrupted(loaded: LoadedModel, request: Request, on_text: Callable[[str], None]) -> Answer:
    """Like `ask`, but Ctrl-C ends the answer and returns what there is (finish reason `abort`)."""
    answer = Answer()
    handle = loaded.engine.submit(request)
    try:
        _follow(handle, answer, on_text)
    except KeyboardInterrupt:
        handle.cancel()
        _follow(handle, answer, on_text)
    return answer


def _follow(handle: RequestHandle, answer: Answer, on_text: Callable[[str], None]) -> None:
    # Leaving this loop early makes the handle abort the request.
    for delta in handle:
        answer.add(delta)
        if delta.text:
            on_text(delta.text)


def ignore_text(_: str) -> None:
    """Take a piece of text and show nothing."""


def logprob_rows(logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
    """Return log-probs as JSON: token_id, logprob and the most likely rivals."""
    return [
        {
            "token_id": entry.token_id,
            "logprob": entry.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]
