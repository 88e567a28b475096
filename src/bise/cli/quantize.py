"""`bise quantize`: pack a model into 4 or 8 bits, so that later starts map it instead of converting."""

from __future__ import annotations

import time
from pathlib import Path

import click

from bise.cli.options import text
from bise.cli.output import ProgressBar, aside, write_json, write_pairs


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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, quant: str, out: Path | None, as_json: bool) -> None:
    """Pack a model into 4 or 8 bits on disk."""
    from bise.cli.models import size_on_disk
    from bise.hub.registry import gigabytes, resolve
    from bise.model.checkpoint import open_model
    from bise.model.packed import pack_model

    started = time.monotonic()
    source = open_model(resolve(model))
    with ProgressBar() as bar:
        packed = pack_model(source, quant, out, progress=bar)
    before = sum(tensor.size_bytes for tensor in source.tensors.values())
    after, seconds = size_on_disk(packed), time.monotonic() - started
    bits = 8 * after / source.config.num_params
    if as_json:
        write_json({"path": str(packed), "quant": quant, "bytes_before": before, "bytes": after,
                    "bits_per_weight": bits, "seconds": seconds})  # fmt: skip
        return
    write_pairs([
        ("packed", str(packed)),
        ("size", f"{gigabytes(before)} -> {gigabytes(after)} ({bits:.2f} bits per parameter)"),
    ])  # fmt: skip
    aside(f"{seconds:.1f} s")
