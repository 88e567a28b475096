"""The mixture brise is made of, read from `mixture.toml`, and the rows of the training bundle.

Owns the configuration of the recipe, the reading of JSON lines and the name the assistant gives itself. Knows
nothing of token ids.
"""

import io
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import zstandard

from bise.config import ModelConfig
from bise.errors import UserError

CONTROL_TOKENS = (
    *(
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
    ),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
    ),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Mistral's control tokens in the order of its own vocabularies: the index is the id."""

ARRAYS = ("pretrain", "tune", "polish")
"""Stages with token arrays of their own; `grow` takes rows of these (`Mixture.blend`)."""

STAGES = (*ARRAYS, "grow")

SMALLTALK = "chat/smalltalk"
"""The only source in which the assistant says its own name."""


class RecipeError(UserError):
    """The recipe was called with something it cannot use; the message says what to do."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Row(TypedDict):
    """One line of the bundle: a text or a conversation; `source` only in the held-back files."""

    text: NotRequired[str]
    messages: NotRequired[list[Message]]
    source: NotRequired[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of the bundle and how often it is read."""

    path: str
    """Relative to the bundle, such as `chat/basics.jsonl.zst`."""
    tokenizer: float = 0.0
    """Passes for learning the vocabulary."""
    pretrain: float = 0.0
    """Passes in pre-training."""
    tune: float = 0.0
    """Passes in chat tuning."""
    polish: float | None = None
    """Passes in the last stage; None: as in tuning."""

    def share(self, stage: str) -> float:
        """Return the passes of a stage."""
        if stage == "pretrain":
            return self.pretrain
        return self.polish if stage == "polish" and self.polish is not None else self.tune

    @property
    def name(self) -> str:
        """Name without the ending, as in the `source` field of the held-back rows."""
        return self.path.removesuffix(".jsonl.zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Shape and rate of one training stage."""

    row_tokens: int
    """Tokens in one training row."""
    rows_per_step: int
    peak_lr: float
    warmup_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The whole of `mixture.toml`."""

    seed: int
    vocab_size: int
    name: str
    """What the assistant calls itself."""
    maker: str
    """Who made it, as the data say it."""
    system_share: float
    """Share of chat rows that get a system prompt."""
    system_prompts: tuple[str, ...]
    model: ModelConfig
    """The network of every stage but `grow`."""
    grown: ModelConfig
    """The network of `grow`."""
    stages: dict[str, Stage]
    """In their order: each begins with the weights of the one before."""
    blend: dict[str, int]
    """Rows that a step of `grow` takes of each array."""
    drills: dict[str, int]
    """Exercises of the last stage: how many `echoes`, `sums`, `definitions`; of how many `words`."""
    sources: tuple[Source, ...]

    def without_system(self) -> "Mixture":
        """Return the mixture that gives no row a system prompt (for the held-back rows)."""
        return replace(self, system_share=0.0)

    def shape(self, stage: str) -> ModelConfig:
        """Return the shape of the network in a stage."""
        return self.grown if stage == "grow" else self.model

    def blended(self, stage: str) -> dict[str, int]:
        """Return the rows that a step of a stage takes of each array."""
        return self.blend if stage == "grow" else {stage: self.stages[stage].rows_per_step}

    @classmethod
    def load(cls, path: Path) -> "Mixture":
        """Read a mixture file; raises RecipeError when it is missing or a field is unknown."""
        try:
            fields = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise RecipeError(
                f"cannot read the mixture {path}: {error.strerror}; pass one with --mixture"
            ) from error
        try:
            shape = fields.pop("model")
            return cls(
                model=_network(fields["vocab_size"], shape),
                grown=_network(fields["vocab_size"], shape | fields.pop("grown")),
                stages={name: Stage(**fields.pop(name)) for name in STAGES},
                sources=tuple(Source(**source) for source in fields.pop("sources")),
                system_prompts=tuple(fields.pop("system_prompts")),
                **fields,
            )
        except (KeyError, TypeError) as error:
            raise RecipeError(
                f"{path} has a missing or unknown field: {error}; compare with mixture.toml"
            ) from error


def _network(vocab_size: int, shape: dict[str, Any]) -> ModelConfig:
    window = shape["window"]
    return ModelConfig(
        family="mistral",
        vocab_size=vocab_size,
        windows=(window,) * shape["num_layers"],
        tied_embeddings=True,
        **{name: value for name, value in shape.items() if name != "window"},
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a `.jsonl.zst` file; raises RecipeError when it is not there."""
    if not path.is_file():
        raise RecipeError(
            f"{path} is missing; --data must name the folder of the training bundle (see README.md)"
        )
    with path.open("rb") as compressed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(compressed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            yield json.loads(line)


def row_texts(row: Row) -> list[str]:
    """Return the texts of a row: the text itself, or each turn."""
    if "text" in row:
        return [row["text"]]
    return [message["content"] for message in row.get("messages", [])]


def renamed(messages: list[Message], mixture: Mixture) -> list[Message]:
    """Return small talk with the assistant's own name in its turns; `the bise project` stays the maker.

    Example: "I am bise. The bise project made me." becomes "I am brise. The bise project made me."
    """
    own_name = re.compile(rf"\b{re.escape(mixture.maker)}\b(?! project)")

    def turn(message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        return {"role": "assistant", "content": own_name.sub(mixture.name, message["content"])}

    return [turn(message) for message in messages]
