"""Packed weights one after the other, for devices with a memory of their own: never a whole model in RAM."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import cast

import numpy as np

from bise.errors import ModelFileError
from bise.formats import FORMATS
from bise.kernels.cpu import Bytes, CpuOps, arena
from bise.kernels.panels import FLOAT_FORMATS
from bise.model.pack import PackPlan, Progress, Slot, pack_tensor, plan_packing
from bise.model.packed import (
    CACHE_MINIMUM_BYTES,
    PackedTensor,
    cache_path,
    open_cached,
    require_finite,
    require_unpacked,
)
from bise.model.packed_writer import PackedWriter
from bise.model.source import ModelSource


def stream_packed(
    source: ModelSource,
    quant: str,
    ops: CpuOps,
    progress: Progress | None = None,
    allocate: Callable[[Slot], Bytes] | None = None,
) -> Generator[tuple[Slot, Bytes]]:
    """Yield the panels of every weight of a source, each in memory of its own that the caller may keep: where
    they are read, in what `allocate` returns.

    Read when packed or cached, else made, and on the way written to the cache when the model is large: the
    same bytes, in the same file, as `load_packed` has. A cache that cannot be written is done without; one
    that turns out to be damaged is removed, and what it did not give is made.
    """
    require_unpacked(source, quant)
    if source.kind == "packed":
        yield from _read(source, progress, allocate)
        return
    plan = plan_packing(source, quant)
    if sum(tensor.size_bytes for tensor in source.tensors.values()) < CACHE_MINIMUM_BYTES:
        yield from _made(source, plan, ops, progress, None)
        return
    path = cache_path(source, quant, progress)
    cached = open_cached(path, source)
    if cached is not None:
        brought: set[str] = set()
        try:
            for slot, panels in _read(cached, progress, allocate):
                brought.add(slot.name)
                yield slot, panels
        except ModelFileError:
            path.unlink(missing_ok=True)
            left = tuple(slot for slot in plan.slots if slot.name not in brought)
            yield from _made(source, replace(plan, slots=left), ops, progress, None)
        return
    try:
        writer = PackedWriter(path, source, plan.slots)
    except OSError:
        writer = None
    yield from _made(source, plan, ops, progress, writer)


def has_rows(source: ModelSource, quant: str) -> bool:
    """Return True when every matrix is stored as floats and stays so: then a device needs no panels of it,
    and no cache of them.
    """
    return source.kind != "packed" and all(
        slot.packed_format in FLOAT_FORMATS and not FORMATS[source.tensors[slot.name].format].is_quantised
        for slot in plan_packing(source, quant).slots
    )


def stream_rows(
    source: ModelSource, quant: str, progress: Progress | None = None
) -> Generator[tuple[Slot, str, Bytes]]:
    """Yield (slot, float format, rows [N, bytes]) of every weight: a matrix as it is stored where that is the
    slot's format, all else in f32. Values are not checked: NaN and infinity come as they are.
    """
    done, total = 0, sum(tensor.size_bytes for tensor in source.tensors.values())
    for slot in plan_packing(source, quant).slots:
        tensor = source.tensors[slot.name]
        stored = tensor.format.lower()
        if stored == slot.packed_format and len(slot.shape) == 2:
            yield slot, stored, tensor.raw(0, slot.shape[0])
        else:
            rows = np.ascontiguousarray(tensor.floats(0, slot.shape[0]))
            yield slot, "f32", rows.reshape(slot.shape[0], -1).view(np.uint8)
        done += tensor.size_bytes
        if progress is not None:
            progress("reading weights", done / max(total, 1))


def _read(
    source: ModelSource, progress: Progress | None, allocate: Callable[[Slot], Bytes] | None
) -> Iterator[tuple[Slot, Bytes]]:
    total, done = sum(tensor.size_bytes for tensor in source.tensors.values()), 0
    for each in source.tensors.values():
        tensor = cast(PackedTensor, each)
        if allocate is None:
            panels = tensor.panels()
        else:
            panels = allocate(tensor.slot)
            tensor.file.read_into(tensor.file.entries[tensor.slot.name], 0, panels)
        require_finite(source, tensor.slot, panels)
        yield tensor.slot, panels
        done += tensor.size_bytes
        if progress is not None:
            progress("reading weights", done / max(total, 1))


def _made(
    source: ModelSource, plan: PackPlan, ops: CpuOps, progress: Progress | None, writer: PackedWriter | None
) -> Iterator[tuple[Slot, Bytes]]:
    done = 0
    try:
        for slot in plan.slots:
            panels = arena(slot.size_bytes)
            pack_tensor(source, slot, source.tensors[slot.name], ops, panels)
            writer = _written(writer, panels)
            yield slot, panels
            done += slot.size_bytes
            if progress is not None:
                progress("packing weights", done / max(plan.size_bytes, 1))
        if writer is not None:
            with suppress(OSError):
                writer.commit()
    finally:
        if writer is not None:
            writer.close()


def _written(writer: PackedWriter | None, panels: Bytes) -> PackedWriter | None:
    """Write panels to the cache; return the writer, or None once the disk takes no more."""
    if writer is None:
        return None
    try:
        writer.write(panels)
    except OSError:
        writer.close()
        return None
    return writer
