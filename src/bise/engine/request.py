"""The values that cross the engine's boundary: what is asked, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bise.errors import BiseError


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token, a stop string or the model's end-of-text."""
    LENGTH = "length"
    """max_tokens were produced, or the context is full."""
    ABORT = "abort"
    """The caller left or cancelled."""
    ERROR = "error"
    """The engine failed; see `Delta.error`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Defaults: the model's own distribution, unchanged.

    Order: logit bias and penalties on the logits, then temperature, then the truncations top_k, top_p, min_p,
    typical_p on the tempered distribution (each on what the one before left), then one draw.
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
    """Divides positive (multiplies negative) logits of tokens seen in prompt or output (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the output; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output; in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to logits by token id; -100 .. 100."""
    seed: int | None = None
    """A draw depends on the seed and the position of the token alone; None takes a random seed."""
    max_tokens: int | None = None
    """Tokens to produce at most; None: up to the context."""
    min_tokens: int = 0
    """End-of-text and stop tokens are masked until this many tokens were produced."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the string itself is not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, besides the model's own."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-text."""
    logprobs: int | None = None
    """None: no log-probs. n: the chosen token's and the n most likely ones' (n <= 20), natural log, of the model's
    own distribution (before temperature, bias and penalties)."""


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


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-prob of one token and its most likely rivals at the same position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-prob), most likely first, ties to the lower id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


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
    usage: Usage | None = None
    timings: Timings | None = None
    error: BiseError | None = None
