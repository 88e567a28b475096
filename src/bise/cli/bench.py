"""`bise bench`: how fast, beside what the machine could do at best, and beside other engines."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import device_options, kv_option, pop_placement, quant_option, text
from bise.cli.output import aside, write_json, write_pairs, write_table
from bise.errors import ConfigError

if TYPE_CHECKING:
    from bise.bench.suite import BenchOptions
    from bise.engine.placement import Placement
    from bise.model.source import ModelSource


class Numbers(click.ParamType):  # pyright: ignore[reportMissingTypeArgument] - generic only in stubs
    """Positive whole numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
            self.fail(f"'{value}' is not a list of positive numbers such as 1,4,16", param, ctx)
        return tuple(int(part) for part in parts)


@click.command("bench")
@click.argument("model", required=False, type=text, metavar="[MODEL]")
@click.option(
    "--shape", help="Random weights of a known shape instead: mistral-7b, mixtral-8x7b, s06, moe, ..."
)
@click.option("--window", type=click.IntRange(min=1), help="With --shape: a sliding window in every layer.")
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="With --shape: so many of its layers, each with the same work.",
)
@click.option(
    "--prompt",
    "prompts",
    type=Numbers(),
    default="512",
    show_default=True,
    help="Prompt lengths to time; empty for none.",
)
@click.option(
    "--gen",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Decoding steps per round; 0 for no decoding.",
)
@click.option(
    "--batch",
    "batches",
    type=Numbers(),
    default="1",
    show_default=True,
    help="Sequences that decode together.",
)
@click.option(
    "--context",
    "contexts",
    type=Numbers(),
    default="16",
    show_default=True,
    help="Depths at which decoding is timed, in tokens.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Turns of each engine; they alternate.",
)
@click.option(
    "--vs",
    "peers",
    default="",
    type=text,
    help="Other engines: llama.cpp[:Q4_0|Q4_K_M|Q8_0|BF16], transformers, ctranslate2.",
)
@quant_option()
@kv_option()
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of every engine.  [default: BISE_THREADS or all cores]",
)
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 3600),
    default=20.0,
    show_default=True,
    help="Seconds to wait for an idle machine before each case, at most.",
)
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(1, 86400),
    default=240.0,
    show_default=True,
    help="No round of a case starts after so many seconds of turns.",
)
@click.option(
    "--roofline",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw each op under the machine's roofs into this SVG file.",
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document only.")
def command(model: str | None, shape: str | None, window: int | None, layers: int | None, peers: str,
            threads: int | None, roofline: Path | None, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Measure prefill and decode speed on this machine.

    Every number stands beside the machine's own limit, measured in the same run. The last line of standard
    output is one JSON document. Disturbed rounds are left out, or marked as noisy when all are. With --device
    a model on a device is measured, beside what the device's memory allows.
    """
    from bise.bench.peers import parse_peers
    from bise.bench.report import columns, limits_of, provenance, table_rows
    from bise.bench.roofline import draw_roofline, op_table
    from bise.bench.suite import BenchOptions, run_bench
    from bise.config import default_threads
    from bise.kernels.cpu import CpuOps

    if shape is None and (window is not None or layers is not None):
        raise click.UsageError("--window and --layers need --shape")
    if roofline is not None and (roofline.suffix.lower() != ".svg" or not roofline.parent.is_dir()):
        raise click.BadParameter(
            f"'{roofline}' must name an .svg file in a directory that exists", param_hint="--roofline"
        )
    placement = pop_placement(values)
    options = BenchOptions(threads=threads or default_threads(), **values)
    if not placement.is_native:
        for name, given in (("--shape", shape), ("--vs", peers), ("--roofline", roofline)):
            if given:
                raise click.UsageError(f"{name} is of the processor; leave it away, or --device and --dtype")
        _measure_device(model, placement, options, as_json)
        return
    document = run_bench(_source(model, shape, window, layers), parse_peers(peers), options, aside)
    origin = provenance(shlex.join(["bise", *sys.argv[1:]]), options.threads, CpuOps(1).isa)
    if roofline is not None:
        title = f"{document['model']} as {document['quant']}, {origin['cpu']}, {options.threads} threads"
        roofline.write_text(draw_roofline(document["ops"], limits_of(document["limits"]), title), "utf-8")
    if not as_json:
        write_table(columns(document["results"]), table_rows(document["results"]))
        click.echo()
        write_table(*op_table(document["ops"]))
        click.echo()
        write_pairs([
            ("model", f"{document['model']} as {document['quant']}, KV in {document['kv']}"),
            ("machine", f"{origin['cpu']}, {origin['isa']}, {options.threads} threads"),
            ("engine", f"{document['engine_step_us']:.0f} us per token beside the model"),
            *(("absent", line) for line in document["skipped"]),
        ])  # fmt: skip
    write_json(origin | document)
    if not document["results"]:
        raise ConfigError(f"nothing was measured: {document['skipped'][0]}")


def _measure_device(model: str | None, placement: Placement, options: BenchOptions, as_json: bool) -> None:
    from bise.bench.device_bench import COLUMNS, run_device_bench, table_rows
    from bise.bench.report import provenance
    from bise.hub.registry import resolve
    from bise.kernels.cpu import CpuOps

    document = run_device_bench(resolve(model), placement, options, aside)
    origin = provenance(shlex.join(["bise", *sys.argv[1:]]), options.threads, CpuOps(1).isa)
    if not as_json:
        write_table(COLUMNS, table_rows(document))
        click.echo()
        rate = document["limits"]["device_gb_per_s"]
        write_pairs([
            ("model", f"{document['model']} as {document['quant']}, KV in {document['kv']}"),
            ("device", f"{document['device']}, products in {document['dtype']}, {rate:,.0f} GB/s measured"),
            ("limit", "weights, keys and values of a step over the measured rates"),
        ])  # fmt: skip
    write_json(origin | document)


def _source(model: str | None, shape: str | None, window: int | None, layers: int | None) -> ModelSource:
    from bise.bench.suite import altered_shape
    from bise.hub.registry import resolve
    from bise.model.checkpoint import open_model
    from bise.plan import known_shape

    if shape is None:
        return open_model(resolve(model))
    if model is not None:
        raise click.UsageError("give either MODEL or --shape")
    return altered_shape(known_shape(shape), window, layers)
