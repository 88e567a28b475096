"""The bodies of the endpoints that take text or tokens instead of messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bise.server.body import WireModel
from bise.server.fields import SamplingFields
from bise.server.limits import MAX_CHOICES, MAX_INPUTS

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenList = Annotated[list[TokenId], Field(min_length=1)]
TextList = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, max_length=MAX_INPUTS)]
Input = str | TextList | TokenList | TokenLists
"""One text, several, one list of tokens, or several."""


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Input
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 24)
    """16 when absent, as OpenAI has it."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ValueError(f"best_of ({self.best_of}) must be at least n ({self.n or 1})")
            if self.stream and self.best_of > (self.n or 1):
                raise ValueError("best_of above n cannot be streamed: the best is known only at the end")
        if self.suffix and not isinstance(self.prompt, str):
            raise ValueError("suffix needs a prompt that is one text")
        if self.truncate is not None and (self.suffix or self.echo):
            raise ValueError("truncate goes with neither suffix nor echo, which need the whole prompt")
        return self


class FimRequest(SamplingFields):
    """POST /v1/fim/completions."""

    prompt: str
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _whole(self) -> FimRequest:
        if self.truncate is not None:
            raise ValueError("truncate cannot shorten a gap's two sides; shorten prompt or suffix")
        return self


class EmbeddingRequest(WireModel):
    """POST /v1/embeddings: OpenAI's and Mistral's names for the same things."""

    model: str = Field(min_length=1, max_length=512)
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=1 << 17)
    output_dimension: int | None = Field(None, ge=1, le=1 << 17)
    """The same as `dimensions`."""
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] | None = None
    pooling: Literal["mean", "last"] | None = None
    """The mean of all tokens' final hidden states (when absent), or the last token's."""
    metadata: dict[str, Any] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> EmbeddingRequest:
        if self.dimensions and self.output_dimension and self.dimensions != self.output_dimension:
            raise ValueError("dimensions and output_dimension mean the same and differ; give one of them")
        return self


class TokenizeRequest(WireModel):
    """POST /v1/tokenize: a prompt as text, or a conversation in the model's chat format."""

    model: str = Field(min_length=1, max_length=512)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """Begin a text with BOS where the model wants one; true when absent."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(WireModel):
    """POST /v1/detokenize."""

    model: str = Field(min_length=1, max_length=512)
    tokens: list[TokenId] = Field(max_length=1 << 20)
