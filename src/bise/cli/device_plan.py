"""`bise plan --device`: what a device holds, what stays in RAM, and how fast it can decode."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bise.cli.output import write_json, write_pairs

if TYPE_CHECKING:
    from bise.engine.device_plan import DevicePlan
    from bise.engine.placement import Placement
    from bise.engine.split import Rates
    from bise.model.source import ModelSource

ASSUMED_DEVICE = 1000.0
ASSUMED_BUS = 25.0
"""GB/s where nothing is stated or measured: a consumer card of 2022 on PCIe 4.0 x 16."""


def tell_device_plan(
    source: ModelSource,
    placement: Placement,
    wanted: dict[str, Any],
    memory: int,
    bandwidths: tuple[float | None, float | None],
    host_bytes_s: float,
    *,
    as_json: bool,
) -> None:
    """Print the plan of a model on a device beside `memory` bytes of RAM; `bandwidths` of device and bus are
    in GB/s, None where none was stated.
    """
    from bise.engine.device import HEADROOM, free_bytes
    from bise.engine.device_plan import make_device_plan
    from bise.errors import ConfigError

    size = placement.memory
    if size is None:
        free = free_bytes(placement)
        if free is None:
            raise ConfigError(
                "this device does not tell how much memory is free; give --device-memory",
                field="device-memory",
            )
        size = free + HEADROOM
    rates, origins = _rates(placement, bandwidths, host_bytes_s)
    plan = make_device_plan(source, placement, device_memory=size, memory=memory, rates=rates, **wanted)
    if as_json:
        write_json(report(source, placement, plan, origins, wanted), indent=2)
        return
    write_pairs(_pairs(source, placement, plan, origins, wanted))


def _rates(
    placement: Placement, bandwidths: tuple[float | None, float | None], host_bytes_s: float
) -> tuple[Rates, tuple[str, str]]:
    """Return the rates, and where those of device and bus come from: stated, measured or assumed."""
    from bise.config import default_threads
    from bise.engine.device import measure_rates, require_device
    from bise.engine.split import Rates
    from bise.errors import ConfigError

    found = [None if each is None else each * 1e9 for each in bandwidths]
    origins = ["stated", "stated"]
    if None in found:
        try:
            require_device(placement)
            measured = measure_rates(placement, default_threads())
            others, origin = (measured.device_bytes_s, measured.bus_bytes_s), "measured"
        except ConfigError:
            others, origin = (ASSUMED_DEVICE * 1e9, ASSUMED_BUS * 1e9), "assumed"
        for index in range(2):
            if found[index] is None:
                found[index], origins[index] = others[index], origin
    device, bus = found
    assert device is not None
    assert bus is not None
    return Rates(device, bus, host_bytes_s), (origins[0], origins[1])


def report(
    source: ModelSource,
    placement: Placement,
    plan: DevicePlan,
    origins: tuple[str, str],
    wanted: dict[str, Any],
) -> dict[str, Any]:
    """Return what `--json` prints; sizes in bytes, speeds in tokens per second, rates in bytes per second."""
    choice = plan.choice
    need = choice.need
    return {
        "model": source.name or str(source.path),
        "on_this_machine": source.kind != "shape",
        "device": placement.device,
        "dtype": placement.compute_format,
        "quant": wanted["quant"],
        "kv": placement.kv_format(wanted["kv"], wanted["quant"]),
        "context": choice.context,
        "sequences": plan.sequences,
        "split": asdict(choice.split),
        "bytes": asdict(need) | {"device_total": need.device, "host_total": need.host},
        "device_memory_bytes": plan.device_memory,
        "memory_bytes": plan.memory,
        "fits": plan.refusal is None,
        "refusal": plan.refusal,
        "largest_context": plan.largest_context,
        "decode_tokens_per_s": plan.decode_tokens_s,
        "rates": asdict(plan.rates) | {"device_origin": origins[0], "bus_origin": origins[1]},
    }


def _pairs(
    source: ModelSource,
    placement: Placement,
    plan: DevicePlan,
    origins: tuple[str, str],
    wanted: dict[str, Any],
) -> list[tuple[str, str]]:
    from bise.cli.inspect import mebibytes

    choice, rates = plan.choice, plan.rates
    need = choice.need
    absent = " (a known shape; its files are not on this machine)" if source.kind == "shape" else ""
    kv_format = placement.kv_format(wanted["kv"], wanted["quant"])
    each = f"{plan.sequences} x {choice.context:,} tokens in {kv_format}"
    lines = [
        ("model", f"{source.name or source.path}{absent}"),
        ("device", f"{placement.device}, {mebibytes(plan.device_memory)}, 512 MiB of them for its driver"),
        ("weights", f"{mebibytes(need.weights)} there as {wanted['quant']}"),
        ("KV cache", f"{mebibytes(need.kv)} there for {each}"),
        ("scratch", f"{mebibytes(need.scratch)} while running, {mebibytes(need.loading)} while loading"),
        ("total", f"{mebibytes(need.device)} on the device at the peak"),
        (
            "in RAM",
            f"{mebibytes(need.host)}: weights {mebibytes(need.host_weights)}, KV {mebibytes(need.host_kv)}, "
            f"scratch {mebibytes(need.host_scratch)}"
            if need.host
            else "nothing but one weight at a time while loading",
        ),
    ]
    if plan.refusal is not None:
        return [*lines, ("verdict", f"does not fit: {plan.refusal}")]
    split = choice.notes[0] if choice.split.mode != "none" else f"everything on {placement.device}"
    device, bus, ram = (
        f"{rate / 1e9:,.0f} GB/s" for rate in (rates.device_bytes_s, rates.bus_bytes_s, rates.host_bytes_s)
    )
    bandwidth = f"device {device} ({origins[0]}), bus {bus} ({origins[1]}), RAM {ram} (measured here)"
    return [
        *lines,
        ("split", split),
        ("verdict", "fits"),
        ("longest", f"{plan.largest_context:,} tokens per sequence with this split"),
        ("speed", f"decode {plan.decode_tokens_s:,.1f} tokens/s at most"),
        ("from", bandwidth),
    ]
