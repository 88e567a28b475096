"""The values that cross the engine's boundary: what is asked, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from bise.errors import BiseError, RequestError, quoted
from bise.grammar.spec import GrammarSpec

MAX_TOP_LOGPROBS = 20
"""Most rivals reported per token."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token, a stop string or the model's end-of-text."""
    LENGTH = "length"
    """max_tokens were produced, or the context is full."""
    ABORT = "abort"
    """The caller left or cancelled."""
    DEADLINE = "deadline"
    """`Request.deadline_s` passed; the tokens so far are there."""
    ERROR = "error"
    """The engine failed; see `Delta.error`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Defaults: the model's own distribution, unchanged.

    Order: logit bias and penalties on the logits, then temperature, then the truncations top_k, top_p, min_p,
    typical_p on the tempered distribution (each on what the one before left), then one draw.

    Raises RequestError, with the field, for a value out of range.
    """

    temperature: float = 1.0
    """0 means greedy (highest logit, ties to the lower id); at most 5."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this times the highest probability; in [0, 1]."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv 2202.00666): keep the tokens nearest to the entropy up to this mass."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens seen in prompt or output (arXiv 1909.05858); in
    [0.01, 100]."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the output; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output; in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to logits by token id; -100 .. 100."""
    seed: int | None = None
    """A draw depends on the seed (0 .. 2^64 - 1) and the position of the token alone; None takes a random
    seed.
    """
    max_tokens: int | None = None
    """Tokens to produce at most; None: up to the context; 0: score the prompt only."""
    min_tokens: int = 0
    """End-of-text and stop tokens are masked until this many tokens were produced."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the string itself is not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides the model's own."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-text."""
    logprobs: int | None = None
    """None: no log-probs. n: the chosen token's and the n most likely ones' (n <= 20), natural log, of the
    model's own distribution (before temperature, bias and penalties)."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 5)
        for name, share in (("top_p", self.top_p), ("typical_p", self.typical_p)):
            _check_number(name, share, 0, 1)
            if share == 0:
                raise RequestError(f"{name} must be above 0 and at most 1, got {share}", field=name)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        for token_id, bias in self.logit_bias.items():
            _check_integer("logit_bias", token_id, 0)
            _check_number("logit_bias", bias, -100, 100)
        _check_integer("top_k", self.top_k, 0, (1 << 31) - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 0)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if isinstance(self.stop, str):
            raise RequestError("stop must be a list of strings, got a single string", field="stop")
        if not all(map(_is_text, self.stop)):
            raise RequestError(
                f"stop must hold strings, none of them empty, got {list(self.stop)!r}", field="stop"
            )
        if type(self.ignore_eos) is not bool:
            raise RequestError(
                f"ignore_eos must be true or false, got {self.ignore_eos!r}", field="ignore_eos"
            )
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _check_number(name: str, value: object, low: float, high: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # pyright: ignore[reportOperatorIssue]
        raise RequestError(f"{name} must be a number from {low} to {high}, got {value!r}", field=name)


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} must be a whole number {bounds}, got {value!r}", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation or scoring job: tokens in, tokens out."""

    token_ids: tuple[int, ...]
    """The prompt, with BOS where the model wants it; at least one token."""
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    """Also return the log-prob of every prompt token given those before it (first None)."""
    priority: int = 0
    """Lower runs first."""
    continuation: bool = False
    """The output goes on in the middle of a text, so that a leading space of SentencePiece vocabularies is
    real.
    """
    prediction: tuple[int, ...] = ()
    """What the output will probably be, as its tokens: where it comes true, several tokens are verified per
    step. The output is the same with it, without it and with a wrong one.
    """
    speculate: bool = True
    """Let the engine guess tokens ahead and verify them where that is faster; the output is the same."""
    tenant: str = ""
    """Who asks (a key's id): tenants of one priority get equal shares and never see one another's cached
    prefixes.
    """
    deadline_s: float | None = None
    """Seconds from `submit` after which the request ends with `FinishReason.DEADLINE` and what it has; None:
    never.
    """
    use_prefix_cache: bool = True
    """Reuse and leave behind cached blocks of the prompt; the output is the same either way."""
    truncate: Literal["oldest", "middle"] | None = None
    """What may be dropped from a prompt that leaves no room for `max_tokens`: its oldest tokens or its middle
    ones. None: nothing, such a request is refused.
    """
    truncate_keep: int = 0
    """Leading tokens (BOS, system prompt) that `truncate` never drops."""
    adapter: str | None = None
    """Name under which a LoRA adapter was loaded into the engine; None: the model as it is."""
    pooling: Literal["last", "mean"] | None = None
    """Return the prompt as a unit vector instead of producing tokens: the last token's final hidden state, or
    the mean over all of them. Needs max_tokens 0.
    """
    grammar: GrammarSpec | None = None
    """The language that the output must belong to, whatever the model and the sampling say."""

    def __post_init__(self) -> None:
        self._check_adapter_and_pooling()
        if self.deadline_s is not None:
            _check_number("deadline_s", self.deadline_s, 0, 1e9)
        if self.truncate not in (None, "oldest", "middle"):
            raise RequestError(
                f"truncate must be oldest or middle, or left out, got {quoted(self.truncate)}",
                field="truncate",
            )
        _check_integer("truncate_keep", self.truncate_keep, 0)
        if self.truncate is not None and self.params.max_tokens is None:
            raise RequestError(
                "truncate needs max_tokens, so that it is known how much room the answer takes",
                field="max_tokens",
            )
        if self.truncate is not None and self.prompt_logprobs:
            raise RequestError(
                "prompt_logprobs scores every token of the prompt, so truncate cannot drop any",
                field="truncate",
            )

    def _check_adapter_and_pooling(self) -> None:
        if self.adapter is not None and not _is_text(self.adapter):
            raise RequestError(
                f"adapter must be the name of a loaded adapter, or left out, got {quoted(self.adapter)}",
                field="adapter",
            )
        if self.pooling not in (None, "last", "mean"):
            raise RequestError(
                f"pooling must be last or mean, or left out, got {quoted(self.pooling)}", field="pooling"
            )
        if self.pooling is not None and self.params.max_tokens != 0:
            raise RequestError(
                f"pooling {self.pooling} returns a vector and no text: max_tokens must be 0, got "
                f"{self.params.max_tokens}",
                field="max_tokens",
            )
        if self.pooling is not None and self.prompt_logprobs:
            raise RequestError(
                "pooling and prompt_logprobs cannot be asked for in one request; send two",
                field="prompt_logprobs",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-prob of one token and its most likely rivals at the same position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-prob), most likely first, ties to the lower id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted. `prompt_tokens + dropped_tokens` are the tokens that the request brought."""

    prompt_tokens: int
    """Prompt tokens that the answer rests on."""
    cached_tokens: int
    """Of these, tokens whose keys and values came from the prefix cache."""
    completion_tokens: int
    accepted_prediction_tokens: int = 0
    """Tokens of `Request.prediction` that came true: the output has them, in place."""
    rejected_prediction_tokens: int = 0
    """The other tokens of `Request.prediction`."""
    dropped_tokens: int = 0
    """Prompt tokens that `Request.truncate` dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a request went, in seconds."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to a request. The last one carries `finish_reason`, `usage` and `timings`."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    """Text that is safe to show; may lag behind `token_ids` while UTF-8 or a stop string is incomplete."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    """The stop string or stop token that ended the text, when one did."""
    embedding: tuple[float, ...] = ()
    """Unit vector [E] of float32 values, in the last delta of a request with `pooling`."""
    usage: Usage | None = None
    timings: Timings | None = None
    error: BiseError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All deltas of one request put together."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    stop_match: str | int | None = None
    embedding: tuple[float, ...] = ()


def collect(deltas: Iterable[Delta]) -> Completion:
    """Return what `deltas`, a whole request's, add up to. Raises the request's own error when it ended with
    one.
    """
    parts = list(deltas)
    last = parts[-1]
    if last.error is not None:
        raise last.error
    assert last.finish_reason is not None
    assert last.usage is not None
    assert last.timings is not None
    return Completion(
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        text="".join(part.text for part in parts),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=tuple(entry for part in parts for entry in part.prompt_logprobs),
        stop_match=last.stop_match,
        embedding=last.embedding,
    )
