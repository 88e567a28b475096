"""What a person asks of a fine-tuning job, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from bise.errors import ConfigError
from bise.train.loop import Schedule
from bise.train.quantised import BITS

METHODS = ("lora", "full", "dpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """What to train and how."""

    method: str = "lora"
    """lora, full, or dpo (an adapter that learns preferences)."""
    base: str = "none"
    """How the matrices of the frozen model are kept under an adapter: none (the compute dtype), q8 or q4."""
    beta: float = 0.1
    """dpo: how dear it is to move away from the base."""
    recompute: bool = False
    """Compute what is inside of a block again on the way back, instead of keeping it."""
    rank: int = 16
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] = ()
    """Matrices to adapt; none: all that the model lets an adapter change."""
    max_tokens: int | None = None
    """Longest text; None: the model's context."""
    truncate: bool = False
    """Cut longer texts instead of refusing them."""
    held_back: float = 0.1
    """Share of the texts to evaluate on."""
    dtype: str = "f32"
    device: str = "cpu"
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method must be one of {', '.join(METHODS)}, got '{self.method}'", field="method"
            )
        if self.base != "none" and (self.base not in BITS or self.method == "full"):
            raise ConfigError(
                f"--base {self.base}: a model under an adapter can be kept as none, q8 or q4; all weights "
                "cannot be trained in few bits",
                field="base",
            )
        if not 0 < self.beta <= 100:
            raise ConfigError(f"--beta must be above 0 and at most 100, got {self.beta:g}", field="beta")
        if not 0 <= self.held_back <= 0.5:
            raise ConfigError(f"--held-back must be from 0 to 0.5, got {self.held_back:g}", field="held_back")
        if self.schedule.kept_epochs and self.method == "full":
            raise ConfigError("--keep-epochs keeps adapters; --method full makes none", field="kept_epochs")
