"""The fields that several endpoints share, as they come over the wire, and what they mean for the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from bise.engine.request import SamplingParams
from bise.server.body import PartModel, WireModel
from bise.server.limits import MAX_DEADLINE_S, MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOPS

_SEED_BITS = (1 << 64) - 1

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(PartModel):
    """How a stream tells its usage."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    """Chunks are never padded."""


class RunFields(WireModel):
    """How a request runs; extensions of bise that change no token of a whole answer."""

    deadline_s: float | None = Field(None, gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)
    """Seconds after which the request ends with an error, whatever it has."""
    use_prefix_cache: bool | None = None
    """Reuse and leave behind cached parts of the prompt; true when absent."""

    @property
    def run_options(self) -> dict[str, Any]:
        """The engine's fields of the same names."""
        return {"deadline_s": self.deadline_s, "use_prefix_cache": self.use_prefix_cache is not False}


class SamplingFields(RunFields):
    """How tokens are chosen; every field may be absent or null."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 22)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, float] | None = Field(None, max_length=MAX_LOGIT_BIAS)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    random_seed: int | None = Field(None, ge=0, lt=1 << 64)
    """The same as `seed`."""
    min_tokens: int | None = Field(None, ge=0, le=1 << 24)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_LOGIT_BIAS)
    ignore_eos: bool | None = None
    truncate: Literal["oldest", "middle"] | None = None
    """What may be left out of a prompt that leaves no room for `max_tokens`; nothing when absent."""
    receipt: bool | None = None
    """Give every choice what `bise replay` needs to make it again."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    """Accepted; changes nothing."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"has {len(value)} strings; at most {MAX_STOPS} are allowed")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key, bias in (value or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f'has the key {key[:40]!r}; keys are token ids, such as "1234"')
            if not -100 <= bias <= 100:
                raise ValueError(f"has {bias} for token {key}; values go from -100 to 100")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingFields:
        if self.seed is not None and self.random_seed is not None and self.seed != self.random_seed:
            raise ValueError("seed and random_seed mean the same and differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.receipt and self.truncate is not None:
            raise ValueError("receipt vouches for the whole prompt, which truncate may shorten; drop one")
        return self

    @property
    def chosen_seed(self) -> int | None:
        """The seed as the engine takes it; a negative one keeps its 64 bits."""
        seed = self.seed if self.seed is not None else self.random_seed
        return None if seed is None else seed & _SEED_BITS

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool | None:
        """True: usage comes in a chunk of its own; None: with the last choice; False: not at all."""
        return None if self.stream_options is None else self.stream_options.include_usage

    def params(
        self,
        *,
        temperature: float,
        max_tokens: int | None,
        logprobs: int | None = None,
        choice: int = 0,
    ) -> SamplingParams:
        """Return the engine's parameters of choice number `choice`; `temperature` is the default one.

        Raises RequestError for what the engine refuses.
        """
        seed = self.chosen_seed
        given = {
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        options = cast(dict[str, Any], {name: value for name, value in given.items() if value is not None})
        return SamplingParams(
            temperature=temperature if self.temperature is None else self.temperature,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            seed=None if seed is None else (seed + choice) & _SEED_BITS,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            **options,
        )


class TextPart(PartModel):
    """A part of a content."""

    type: Literal["text"]
    text: str


class Prediction(PartModel):
    """What the answer will probably be; makes it come faster, never different."""

    type: Literal["content"] = "content"
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The predicted text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content
