"""Models on a device that torch drives: what is there, what is free, and how weights get onto it.

Everything above the ops is the same code for all of them: definition, scheduler, cache, sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bise.engine.memory import available_memory, gibibytes
from bise.engine.placement import Placement
from bise.engine.split import Choice, Chooser, Rates, Sizes, Split, with_longer_context
from bise.errors import ConfigError
from bise.kernels import Array, Weight
from bise.kernels.cpu import Bytes, CpuOps, arena, read_rate
from bise.model.pack import Progress, Slot, not_finite
from bise.model.source import ModelSource
from bise.model.stream import has_rows, stream_packed, stream_rows

if TYPE_CHECKING:
    from bise.kernels.split import SplitOps
    from bise.kernels.torch import TorchOps

_Item = TypeVar("_Item")

HEADROOM = 512 << 20
"""Device memory left to the driver, the compiled kernels and the allocator's rounding."""

_PROBE_BYTES = 64 << 20


def make_ops(placement: Placement, split: Split | None = None, threads: int = 1) -> TorchOps | SplitOps:
    """Return the ops of a device that torch drives: Triton's kernels on a CUDA device, plain torch elsewhere;
    with a split that leaves something in RAM, joined by the processor's on `threads` threads.

    Raises ConfigError when torch, the device, or what Triton needs to start kernels is absent.
    """
    require_device(placement)
    from bise.kernels.grouped import FLOATS
    from bise.kernels.split import ChoosingSplitOps, SplitOps
    from bise.kernels.torch import TorchOps

    dtype = FLOATS[placement.compute_format]
    if split is not None and split.mode == "none":
        split = None
    if not placement.is_cuda or find_spec("triton") is None:
        plain = TorchOps(dtype, placement.device)
        return plain if split is None else SplitOps(CpuOps(threads), plain, split.host_layers)
    from bise.kernels.triton import require_launcher
    from bise.kernels.triton.ops import TritonOps

    require_launcher()
    device = TritonOps(dtype, placement.device)
    return device if split is None else ChoosingSplitOps(CpuOps(threads), device, split.host_layers)


def visible_devices() -> tuple[str, ...] | None:
    """Return a line for each device that torch can drive here besides the processor; None without torch."""
    if find_spec("torch") is None:
        return None
    import torch

    found: list[str] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        _, size = torch.cuda.mem_get_info(index)
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {gibibytes(size)}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)


def require_device(placement: Placement) -> None:
    """Raise ConfigError unless the device, the type, and torch where it needs it, are there."""
    if placement.is_native:
        return
    if find_spec("torch") is None:
        raise ConfigError(
            f"device {placement.device} needs PyTorch; pip install 'bise[torch]', or leave --device and "
            "--dtype away",
            field="device",
        )
    import torch

    if placement.device == "mps" and not torch.backends.mps.is_available():
        raise _absent(placement, "no Metal", torch.__version__)
    if placement.is_cuda:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(placement.device.partition(":")[2] or 0) >= count:
            raise _absent(placement, f"{count or 'no'} CUDA", torch.__version__)
        major, minor = torch.cuda.get_device_capability(torch.device(placement.device))
        if placement.compute_format == "bf16" and major < 8 and torch.version.hip is None:
            raise ConfigError(
                f"dtype bf16 needs a device of compute capability 8.0, {placement.device} has {major}.{minor}"
                "; use --dtype f16",
                field="dtype",
            )


def _absent(placement: Placement, seen: str, version: str) -> ConfigError:
    return ConfigError(
        f"device {placement.device} is not there: PyTorch {version} sees {seen} device(s); see `bise "
        "doctor`, or use --device cpu",
        field="device",
    )


def device_name(placement: Placement, split: Split | None) -> str:
    """Return what tells one place of computing from another whose last bits may differ; empty for the native
    extension.
    """
    if placement.is_native:
        return ""
    import torch

    where = (
        torch.cuda.get_device_name(torch.device(placement.device)) if placement.is_cuda else placement.device
    )
    return f" {where} {placement.compute_format} {split}"


def free_bytes(placement: Placement) -> int | None:
    """Return the memory that a model may take on the device; None when it does not tell.

    Raises ConfigError when the device is absent.
    """
    require_device(placement)
    if placement.is_cuda:
        import torch

        torch.cuda.empty_cache()  # what models that are gone have left with PyTorch
        free: int | None = max(torch.cuda.mem_get_info(torch.device(placement.device))[0] - HEADROOM, 0)
    else:
        free = available_memory()
    if placement.memory is None:
        return free
    return placement.memory if free is None else min(placement.memory, free)


def choose_split(
    source: ModelSource,
    quant: str,
    placement: Placement,
    *,
    kv_format: str,
    context: int | None,
    sequences: int,
    device_free: int | None,
    threads: int,
    beside: Callable[[int], int] | None = None,
    split: Split | None = None,
) -> Choice:
    """Return what of a model is to lie on its device and for which context, from headers alone and from what
    is free; `beside` are the device's bytes that another model takes for a context, `split` a choice made
    before.

    Raises MemoryPlanError when it does not fit, ConfigError for a context or a way the model does not have.
    """
    longest = source.config.max_context
    if context is not None:
        source.config.check_context(context)
    chooser = Chooser(
        sizes=Sizes(source, quant, placement, kv_format),
        placement=placement,
        sequences=sequences,
        device_free=device_free,
        host_free=available_memory(),
        rates=lambda: measure_rates(placement, threads),
        beside=beside,
    )
    if split is not None:
        return chooser.check(split, longest if context is None else context)
    choice = chooser.choose(context)
    return choice if context is not None else with_longer_context(chooser, choice)


def measure_rates(placement: Placement, threads: int) -> Rates:
    """Return the rates of this machine and its device, measured in a fraction of a second."""
    memory = arena(_PROBE_BYTES)
    memory.fill(1)
    host = max(read_rate(memory, threads) for _ in range(3))
    if not placement.is_cuda:
        return Rates(host, host / 2, host)
    import torch

    where = torch.device(placement.device)
    pinned = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    # More than a cache of 60 MB holds, where there is room for it.
    size = _PROBE_BYTES * (8 if torch.cuda.mem_get_info(where)[0] > 4 << 30 else 1)
    source, target = (torch.empty(size, dtype=torch.uint8, device=where) for _ in range(2))

    # Not for the whole device: that breaks off what another model's thread may be recording.
    stream = torch.cuda.current_stream(where)

    def seconds(copy: Callable[[], object], count: int) -> float:
        copy()
        stream.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            copy()
        stream.synchronize()
        return (time.perf_counter() - began) / count

    bus = _PROBE_BYTES / seconds(lambda: source[:_PROBE_BYTES].copy_(pinned, non_blocking=True), 4)
    own = 2 * size / seconds(lambda: target.copy_(source), 32)
    return Rates(own, bus, host)


def place_weights(
    source: ModelSource,
    quant: str,
    ops: TorchOps | SplitOps,
    split: Split,
    threads: int,
    progress: Progress | None,
) -> dict[str, Weight | Array]:
    """Return every weight by name where the split wants it; of those that go to the device there are two at a
    time in RAM: one on its way, and the next one, read meanwhile. A head that is the embeddings too has a
    second form, `output`, where the two are apart.
    """
    from bise.kernels.experts import hold

    device, host = device_ops(ops), CpuOps(threads)
    found: dict[str, Weight | Array] = {}
    for slot, panels, weight in _weights(source, quant, device, host, split, progress):
        place = split.place(slot.name)
        if place == "held":
            found[slot.name] = hold(weight(), split.experts[int(slot.name.split(".")[1])])
            continue
        found[slot.name] = weight() if place == "device" else _from_panels(host, slot, panels)
        if slot.name == "tok_embeddings" and place == "host" and source.config.tied_embeddings:
            found["output"] = weight()
        del panels, weight  # not kept while the next one is waited for
    return found


def _weights(
    source: ModelSource, quant: str, device: TorchOps, host: CpuOps, split: Split, progress: Progress | None
) -> Generator[tuple[Slot, Bytes, Callable[[], Weight | Array]]]:
    """Yield the slot of every weight, its panels, and what brings it to the device.

    Floats that stay floats need no panels there: rows go as they are stored, and no cache is made of them.
    """
    from bise.kernels.experts import staging

    if split.mode in ("none", "copy") and has_rows(source, quant):
        for slot, stored, rows in _read_ahead(stream_rows(source, quant, progress)):
            yield slot, rows, partial(_from_rows, device, source, slot, stored, rows)
            del rows
        return

    def allocate(slot: Slot) -> Bytes:
        is_kept = split.place(slot.name) == "host"
        return arena(slot.size_bytes) if is_kept else staging(slot.size_bytes, device.device)

    for slot, panels in _read_ahead(stream_packed(source, quant, host, progress, allocate)):
        yield slot, panels, partial(_from_panels, device, slot, panels)
        del panels


def _read_ahead(weights: Generator[_Item]) -> Generator[_Item]:
    """Yield weights, the next one being read or packed in a thread while the caller has the one before."""
    with closing(weights), ThreadPoolExecutor(1, thread_name_prefix="bise-weights") as reader:
        coming = reader.submit(next, weights, None)
        while (found := coming.result()) is not None:
            coming = reader.submit(next, weights, None)
            yield found
            del found  # else it would stay in RAM beside the two that come


def device_ops(ops: TorchOps | SplitOps) -> TorchOps:
    """Return the ops of the device alone."""
    from bise.kernels.split import SplitOps

    return ops.device if isinstance(ops, SplitOps) else ops


def _from_panels(ops: Any, slot: Slot, panels: Bytes) -> Weight | Array:
    if len(slot.shape) == 1:
        return ops.vector(panels.view(np.float32))
    return ops.packed(slot.packed_format, *slot.shape, panels)


def _from_rows(ops: TorchOps, source: ModelSource, slot: Slot, stored: str, rows: Bytes) -> Weight | Array:
    """Return a weight of floats on the device; ModelFileError when its format cannot hold a value of it."""
    import torch

    from bise.kernels.grouped import FLOATS

    values = torch.as_tensor(rows).to(ops.device).view(FLOATS[stored]).view(slot.shape)
    if not bool(torch.isfinite(values.to(FLOATS[slot.packed_format])).all()):
        raise not_finite(source, slot)
    return ops.vector(values) if len(slot.shape) == 1 else ops.floats(slot.packed_format, values)
