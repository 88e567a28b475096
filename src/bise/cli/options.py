"""Options that several verbs share: which model, how to load it, how to sample."""

from __future__ import annotations

import re
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
    from bise.engine.placement import Placement
    from bise.engine.request import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}  # fmt: skip


def text(value: str) -> str:
    """Return text from the command line; refuse bytes that were not UTF-8 (a terminal can hand over any)."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("is not valid UTF-8 text") from error
    return value


class MemorySize(click.ParamType):  # pyright: ignore[reportMissingTypeArgument] - generic only in stubs
    """An amount of memory: `16GiB`, `8G`, `512MiB`, or plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
        if size < 1:
            self.fail(f"'{value}' is not an amount of memory such as 16GiB, 8G or 512MiB", param, ctx)
        return size


class Gibibytes(MemorySize):
    """As `MemorySize`, but a plain number counts GiB."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        is_plain = re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", str(value))
        return super().convert(f"{value}GiB" if is_plain else value, param, ctx)


class LayerCount(click.ParamType):  # pyright: ignore[reportMissingTypeArgument] - generic only in stubs
    """A number of layers, or `auto`: None."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number."""
        if value == "auto" or isinstance(value, int):
            return None if value == "auto" else value
        if not re.fullmatch(r"[0-9]{1,4}", str(value)):
            self.fail(f"'{value}' is not a number of layers, nor auto", param, ctx)
        return int(value)


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
    placement: Placement | None = None
    """The device that it runs on; None: this processor, natively."""

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
    """Add the options that say on which device, and what stays in RAM; `pop_placement` gathers them."""
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
        click.option(
            "--device-memory",
            type=MemorySize(),
            help="Most that a model may take on the device, such as 20GiB.  [default: what is free]",
        ),
        click.option(
            "--gpu-layers",
            type=LayerCount(),
            metavar="N|auto",
            help="Layers on the device, the last ones; the others stay in RAM.  [default: what fits]",
        ),
        click.option(
            "--offload",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "none", "layers", "compute", "copy"]),
            help="What stays in RAM of a model that the device cannot hold: layers, or experts that are "
            "computed there or copied when wanted; none refuses it.",
        ),
    ]
    return _apply(decorators, function)


def pop_placement(values: dict[str, Any]) -> Placement:
    """Take the device options out of a command's keyword arguments."""
    from bise.engine.placement import Placement

    return Placement(
        values.pop("device"),
        values.pop("dtype"),
        offload=values.pop("offload"),
        layers=values.pop("gpu_layers"),
        memory=values.pop("device_memory"),
    )


def load_options(function: F) -> F:
    """Add the options that say how to load a model; `pop_load_options` gathers them."""
    decorators = [
        quant_option(
            "Weights: auto keeps what a file has quantised and makes floats q8; none computes with the "
            "stored values in float32."
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
    names = ("quant", "kv", "threads", "context", "adapter", "draft")
    return LoadOptions(placement=pop_placement(values), **{name: values.pop(name) for name in names})


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
