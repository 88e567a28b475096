"""`bise quantize`: pack a model into 4 or 8 bits, so that later starts map it instead of converting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bise.cli.options import text
from bise.cli.output import ProgressBar, aside, write_json, write_pairs
from bise.errors import ConfigError

if TYPE_CHECKING:
    from bise.model.pack import Progress, Rounding
    from bise.model.source import ModelSource
    from bise.quant.card import CardText
    from bise.quant.quality import Quality


@click.command("quantize")
@click.argument("model", type=text)
@click.option(
    "--quant", required=True, type=click.Choice(["q4", "q8", "bf16"]), help="Width of the packed weights."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the packed model.  [default: the cache]",
)
@click.option(
    "--calibrate", is_flag=True, help="Fit the 4-bit rounding to what the matrices read on a bundled text."
)
@click.option(
    "--text",
    "text_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text that the quality card is measured on.  [default: a bundled one]",
)
@click.option("--no-card", is_flag=True, help="Write no quality card (QUALITY.md, quality.json).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    quant: str,
    out: Path | None,
    calibrate: bool,
    text_path: Path | None,
    no_card: bool,
    as_json: bool,
) -> None:
    """Pack a model into 4 or 8 bits on disk.

    A packed directory gets a quality card: how far its outputs are from the original's, on a text.
    """
    from bise.cli.models import size_on_disk
    from bise.hub.registry import gigabytes, resolve
    from bise.model.checkpoint import open_model
    from bise.model.packed import pack_model
    from bise.quant.card import bundled_text, text_file

    _check(quant, out, calibrate, text_path, no_card)
    started = time.monotonic()
    measured_on = bundled_text("evaluation") if text_path is None else text_file(text_path)
    source = open_model(resolve(model))
    with ProgressBar() as bar:
        calibration = bundled_text("calibration") if calibrate else None
        rounding = None if calibration is None else _rounding(source, calibration, bar)
        packed = pack_model(source, quant, out, progress=bar, rounding=rounding)
        quality = None
        if out is not None and not no_card:
            quality = _write_card(source, out, quant, calibration, measured_on, bar)
    before = sum(tensor.size_bytes for tensor in source.tensors.values())
    after, seconds = size_on_disk(packed), time.monotonic() - started
    bits = 8 * after / source.config.num_params
    if as_json:
        write_json({"path": str(packed), "quant": quant, "bytes_before": before, "bytes": after,
                    "bits_per_weight": bits, "seconds": seconds,
                    "kl": None if quality is None else quality.kl_mean})  # fmt: skip
        return
    pairs = [
        ("packed", str(packed)),
        ("size", f"{gigabytes(before)} -> {gigabytes(after)} ({bits:.2f} bits per parameter)"),
    ]
    if quality is not None:
        pairs.append(("quality", f"KL {quality.kl_mean:.5f} nats per token, same likeliest token "
                                 f"{100 * quality.top1_agreement:.1f} %"))  # fmt: skip
    write_pairs(pairs)
    aside(f"{seconds:.1f} s")


def _check(quant: str, out: Path | None, calibrate: bool, text_path: Path | None, no_card: bool) -> None:
    if calibrate and quant != "q4":
        raise ConfigError("--calibrate is for --quant q4: wider weights need none", field="calibrate")
    if calibrate and out is None:
        raise ConfigError("--calibrate needs --out DIR: the cache holds what any start makes", field="out")
    if text_path is not None and (no_card or out is None):
        raise ConfigError("--text is for the quality card, which is written with --out DIR", field="text")


def _rounding(source: ModelSource, text: CardText, progress: Progress) -> Rounding:
    from bise.config import default_threads
    from bise.engine.memory import available_memory, require_weights
    from bise.kernels.cpu import CpuOps
    from bise.model.pack import pack_weights
    from bise.quant.calibration import observe
    from bise.quant.card import token_rows, tokenizer_of

    require_weights(source, "none", available_memory())
    rows = token_rows(text, tokenizer_of(source), source.config.max_context)
    threads = default_threads()
    return observe(source, pack_weights(source, "none", CpuOps(threads), progress), rows, threads)


def _write_card(
    source: ModelSource,
    out: Path,
    quant: str,
    calibration: CardText | None,
    text: CardText,
    progress: Progress,
) -> Quality | None:
    from bise.config import default_threads
    from bise.quant.card import measure, quality_card, write_card

    measured = measure(source, out, text, default_threads(), progress)
    command = ["bise", "quantize", source.name or source.path.name, "--quant", quant]
    command += ["--calibrate"] if calibration is not None else []
    card = quality_card(
        source, out, quant=quant, calibration=calibration, text=text, measured=measured, command=command
    )
    write_card(out, card, measured[0])
    if measured[1] is not None:
        aside(f"quality not measured: {measured[1]}")
    return measured[0]
