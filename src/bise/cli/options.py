"""Options that several verbs share: which model, how to load it, how to sample."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bise.errors import UserError

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.engine.request import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


def text(value: str) -> str:
    """Return text from the command line; refuse bytes that were not UTF-8 (a terminal can hand over any)."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("is not valid UTF-8 text") from error
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded."""

    quant: str
    kv: str
    threads: int | None
    context: int | None
    adapter: str | None = None
    """Directory of a LoRA adapter that every request uses."""
    draft: str | None = None
    """A model that guesses tokens ahead."""
    device: str = "cpu"
    dtype: str = "auto"

    @property
    def adapter_name(self) -> str | None:
        """What requests call the adapter: the name of its directory."""
        return None if self.adapter is None else Path(self.adapter).resolve().name or "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, as given on the command line; the seed is always known, for repeating a run."""

    temperature: float | None
    """None: what the model's author suggests."""
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]

    def params(
        self, *, max_tokens: int | None, logprobs: int | None = None, ignore_eos: bool = False
    ) -> SamplingParams:
        """Return the engine's parameters, for `settled` to complete; what is out of range is refused here."""
        from bise.engine.request import SamplingParams

        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop,
            max_tokens=max_tokens,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )


def settled(params: SamplingParams, sampling: SamplingOptions, loaded: LoadedModel) -> SamplingParams:
    """Return `params` with the model's own temperature where the command line names none."""
    return params if sampling.temperature is not None else replace(params, temperature=loaded.temperature)


def model_argument(function: F) -> F:
    """Add the optional MODEL argument."""
    return click.argument("model", required=False, type=text, metavar="[MODEL]")(function)


def quant_option(description: str = "Width of the weights.") -> Callable[[F], F]:
    """Return the decorator that adds --quant."""
    return click.option(
        "--quant",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "q4", "q8", "bf16", "none"]),
        help=description,
    )


def kv_option() -> Callable[[F], F]:
    """Return the decorator that adds --kv."""
    return click.option(
        "--kv",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "q16", "q8", "f16", "bf16", "f32"]),
        help="Storage of the key/value cache.",
    )


def device_options(function: F) -> F:
    """Add --device and --dtype."""
    decorators = [
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            type=text,
            metavar="cpu|cuda[:N]|mps",
            help="Where the model runs; all but cpu need bise[torch].",
        ),
        click.option(
            "--dtype",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "f32", "f16", "bf16"]),
            help="Type of products on a device; with cpu it means PyTorch instead of bise's own kernels.",
        ),
    ]
    return _apply(decorators, function)


def load_options(function: F) -> F:
    """Add the options that say how to load a model; `pop_load_options` gathers them."""
    decorators = [
        quant_option(
            "Weights: auto keeps the stored width; none computes with the stored values in float32."
        ),
        kv_option(),
        click.option(
            "--threads",
            type=click.IntRange(1, 1024),
            help="Worker threads.  [default: BISE_THREADS or all cores]",
        ),
        click.option(
            "--context", type=click.IntRange(min=1), help="Context in tokens.  [default: the model's own]"
        ),
        click.option(
            "--adapter",
            type=text,
            metavar="DIR",
            help="Use the LoRA adapter in this directory (PEFT's format).",
        ),
        click.option(
            "--draft",
            type=text,
            metavar="MODEL",
            help="A small model of the same vocabulary that guesses ahead; the output is the same, sooner.",
        ),
        device_options,
    ]
    return _apply(decorators, function)


def sampling_options(function: F) -> F:
    """Add the options that say how tokens are chosen; `pop_sampling_options` gathers them."""
    decorators = [
        click.option(
            "--temperature",
            type=float,
            help="Randomness; 0 always takes the likeliest token.  [default: the model's own, else 0.7]",
        ),
        click.option(
            "--top-p",
            default=1.0,
            show_default=True,
            help="Keep the likeliest tokens up to this probability mass.",
        ),
        click.option(
            "--top-k", default=0, show_default=True, help="Keep the k likeliest tokens; 0 keeps all."
        ),
        click.option(
            "--min-p",
            default=0.0,
            show_default=True,
            help="Drop tokens below this share of the likeliest one's probability.",
        ),
        click.option(
            "--typical-p",
            default=1.0,
            show_default=True,
            help="Keep the most typical tokens up to this mass.",
        ),
        click.option(
            "--repetition-penalty",
            default=1.0,
            show_default=True,
            help="Above 1, seen tokens become less likely.",
        ),
        click.option(
            "--presence-penalty",
            default=0.0,
            show_default=True,
            help="Subtracted once from produced tokens' logits.",
        ),
        click.option(
            "--frequency-penalty", default=0.0, show_default=True, help="Subtracted per occurrence."
        ),
        click.option("--seed", type=int, help="Same seed, same text.  [default: random, reported by --json]"),
        click.option("--stop", multiple=True, type=text, help="End at this text; may be repeated."),
    ]
    return _apply(decorators, function)


def _apply(decorators: list[Callable[[F], F]], function: F) -> F:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def pop_load_options(values: dict[str, Any]) -> LoadOptions:
    """Take the load options out of a command's keyword arguments."""
    return LoadOptions(
        **{
            name: values.pop(name)
            for name in ("quant", "kv", "threads", "context", "adapter", "draft", "device", "dtype")
        }
    )


def pop_sampling_options(values: dict[str, Any]) -> SamplingOptions:
    """Take the sampling options out of a command's keyword arguments, choosing a seed when none was given."""
    seed = values.pop("seed")
    names = (
        "temperature", "top_p", "top_k", "min_p", "typical_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    )  # fmt: skip
    return SamplingOptions(
        seed=secrets.randbits(32) if seed is None else seed, **{name: values.pop(name) for name in names}
    )


def read_stdin_text(option: str) -> str:
    """Return all of standard input as text, nothing added or removed; UserError when it is not UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option} -: standard input is not UTF-8 (byte {error.start})", field=option
        ) from error
