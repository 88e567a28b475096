"""`bise plan`: what fits and how fast, before anything is loaded or downloaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import MemorySize, device_options, kv_option, pop_placement, quant_option, text
from bise.cli.output import write_json, write_pairs

if TYPE_CHECKING:
    from bise.model.source import ModelSource
    from bise.plan import MachineLimits, Plan


@click.command("plan")
@click.argument("model", type=text)
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens per sequence.  [default: the model's own]"
)
@click.option(
    "--sequences",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Sequences of that length at once.",
)
@quant_option()
@kv_option()
@click.option(
    "--memory", type=MemorySize(), help="Memory granted, such as 16GiB.  [default: what is free now]"
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads the speed is predicted for.  [default: BISE_THREADS or all cores]",
)
@click.option(
    "--adapter", "adapters", multiple=True, type=text, metavar="DIR",
    help="A LoRA adapter loaded beside the model; may be repeated.",
)  # fmt: skip
@device_options
@click.option(
    "--device-bandwidth", type=click.FloatRange(min=0.1), metavar="GB/S",
    help="With --device: how fast it reads its memory.  [default: measured, else 1000]",
)  # fmt: skip
@click.option(
    "--bus-bandwidth", type=click.FloatRange(min=0.1), metavar="GB/S",
    help="With --device: how fast weights reach it from RAM.  [default: measured, else 25]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str, context: int | None, sequences: int, quant: str, kv: str, memory: int | None,
    threads: int | None, adapters: tuple[str, ...], as_json: bool, **device: Any,
) -> None:  # fmt: skip
    """Tell what fits in memory and how fast it can be.

    MODEL is a directory, a .gguf file, or an alias, which need not be on this machine. Reads headers only.
    Speeds are ceilings from this machine's measured memory and arithmetic rates. With --device the plan is
    for a device, which need not be on this machine where --device-memory tells its size: what it holds, what
    stays in RAM, and how fast it can decode.
    """
    from bise.bench.limits import measure_limits
    from bise.config import default_threads, user_path
    from bise.engine.memory import available_memory
    from bise.errors import ConfigError
    from bise.model.lora import open_adapter
    from bise.plan import make_plan

    source = _source(model)
    grant = available_memory() if memory is None else memory
    if grant is None:
        raise ConfigError("this system does not tell how much memory is free; give --memory", field="memory")
    limits = measure_limits(threads or default_threads())
    bandwidths = device.pop("device_bandwidth"), device.pop("bus_bandwidth")
    placement = pop_placement(device)
    if not placement.is_native:
        from bise.cli.device_plan import tell_device_plan

        if adapters:
            raise ConfigError("adapter is not planned for a device; leave it away", field="adapter")
        wanted = {"quant": quant, "kv": kv, "context": context, "sequences": sequences}
        tell_device_plan(source, placement, wanted, grant, bandwidths, limits.read_bytes_s, as_json=as_json)
        return
    if any(bandwidths):
        raise ConfigError("device-bandwidth and bus-bandwidth need --device cuda", field="device")
    plan = make_plan(
        source,
        quant=quant,
        kv=kv,
        context=context or source.config.max_context,
        sequences=sequences,
        memory=grant,
        adapters=sum(open_adapter(user_path(name), source.config).size_bytes for name in adapters),
        limits=limits,
    )
    if as_json:
        write_json(report(source, plan, limits), indent=2)
        return
    write_pairs(_pairs(source, plan, limits))


def _source(model: str) -> ModelSource:
    from bise.errors import UserError
    from bise.hub.registry import resolve
    from bise.model.checkpoint import open_model
    from bise.plan import known_shape, shapes

    try:
        path = resolve(model)
    except UserError:
        if model not in shapes():
            raise
        return known_shape(model)
    return open_model(path)


def report(source: ModelSource, plan: Plan, limits: MachineLimits) -> dict[str, Any]:
    """Return what `--json` prints; sizes in bytes, speeds in tokens per second."""
    from bise.bench.report import limits_fields

    need = plan.need
    return {
        "model": source.name or str(source.path),
        "on_this_machine": source.kind != "shape",
        "quant": plan.quant,
        "kv": plan.kv_format,
        "context": plan.context,
        "sequences": plan.sequences,
        "bytes": asdict(need) | {"total": need.total},
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "largest_context": plan.largest_context,
        "best_quant": plan.best_quant,
        "decode_tokens_per_s": plan.decode_tokens_s,
        "prefill_tokens_per_s": plan.prefill_tokens_s,
        "limits": limits_fields(limits),
    }


def _pairs(source: ModelSource, plan: Plan, limits: MachineLimits) -> list[tuple[str, str]]:
    from bise.bench.report import limits_text
    from bise.cli.inspect import mebibytes

    need = plan.need
    absent = " (a known shape; its files are not on this machine)" if source.kind == "shape" else ""
    spare = plan.memory - need.total
    verdict = (
        f"fits in {mebibytes(plan.memory)}, {mebibytes(spare)} to spare"
        if plan.fits
        else f"does not fit in {mebibytes(plan.memory)}: {mebibytes(-spare)} are missing"
    )
    each = f"{plan.sequences} x {plan.context:,} tokens in {plan.kv_format}"
    longest = f"{plan.largest_context:,} tokens" if plan.largest_context else "none fits"
    speed = "unknown"
    if plan.decode_tokens_s and plan.prefill_tokens_s:
        speed = f"decode {plan.decode_tokens_s:,.1f}, prefill {plan.prefill_tokens_s:,.1f} tokens/s at most"
    return [
        ("model", f"{source.name or source.path}{absent}"),
        ("weights", f"{mebibytes(need.weights)} as {plan.quant}"),
        ("KV cache", f"{mebibytes(need.kv)} for {each}"),
        *([("adapters", f"{mebibytes(need.adapters)} of LoRA matrices")] if need.adapters else []),
        ("scratch", f"{mebibytes(need.scratch)} while running, {mebibytes(need.loading)} while loading"),
        ("process", f"{mebibytes(need.process)} for interpreter, libraries and tokenizer"),
        ("total", f"{mebibytes(need.total)} at the peak"),
        ("verdict", verdict),
        ("longest", f"{longest} per sequence"),
        ("widest", plan.best_quant or ("packed already" if source.kind == "packed" else "nothing fits")),
        ("speed", speed),
        ("machine", limits_text(limits)),
    ]  # fmt: skip
