"""Weights from a source into packed panels: which format each gets, and the streaming that fills the memory.

One arena holds every matrix of a model; tensors are read in slices, so the peak is the packed size plus one
slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bise.errors import ConfigError, ModelFileError
from bise.formats import FORMATS
from bise.kernels import Array, Weight
from bise.kernels.cpu import Bytes, CpuOps, arena, packed_format_of, packed_size
from bise.model.importance import column_importance
from bise.model.source import ModelSource, SourceTensor

Progress = Callable[[str, float], None]

QUANTS = ("auto", "none", "bf16", "q8", "q4")
"""Values of `--quant`."""

_FLOATS_AS = {"q4": "z4"}
"""Packed format of floats where it is not the quant's own: 4-bit codes with a zero point per block take the
bits of those with a scale alone and lose a quarter less (docs/quality.md)."""

_CALIBRATED_AS = {"q4": "n4"}
"""The same where a `Rounding` makes the codes: into the IQ4 codebook."""

_FOUR_BITS = ("q4", "q4k", "n4", "n4k", "z4")
"""Packed formats that a file's own blocks keep when `q4` is asked for."""

Rounding = Callable[[str, npt.NDArray[np.float32]], Bytes | None]
"""Rounds rows [n, K] of the named matrix to IQ4_NL blocks [n, bytes per row]; None leaves it to
the search.

See `bise.quant.calibration`.
"""

SLICE_BYTES = 48 << 20
"""Float bytes of the rows converted at once."""

_IQ4_NL = FORMATS["IQ4_NL"].ggml_id or 0

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one weight lies in the arena."""

    name: str
    shape: tuple[int, ...]
    packed_format: str
    """A packed format of the native kernels; `f32` vectors keep their plain layout."""
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """How a model will be packed; made from headers alone."""

    slots: tuple[Slot, ...]
    size_bytes: int
    """Bytes of the arena."""
    notes: tuple[str, ...]
    """One line per kind of conversion that changes values."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A packed model in memory."""

    plan: PackPlan
    memory: Bytes

    def weights(self, ops: CpuOps) -> dict[str, Weight | Array]:
        """Return every weight by name in the form of `ops`; they keep the memory alive."""
        found: dict[str, Weight | Array] = {}
        for slot in self.plan.slots:
            data = self.memory[slot.offset : slot.offset + slot.size_bytes]
            if len(slot.shape) == 1:
                found[slot.name] = data.view(np.float32)
            else:
                num_rows, num_columns = slot.shape
                found[slot.name] = ops.packed(slot.packed_format, num_rows, num_columns, data)
        return found


def plan_slots(formats: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[tuple[Slot, ...], int]:
    """Lay out (shape, packed format) by name one after the other, aligned; returns the slots and the total
    bytes.
    """
    slots: list[Slot] = []
    offset = 0
    for name, (shape, packed_format) in formats.items():
        size = 4 * shape[0] if len(shape) == 1 else packed_size(packed_format, *shape)
        slots.append(Slot(name, shape, packed_format, offset, size))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return tuple(slots), offset


def plan_packing(source: ModelSource, quant: str, is_calibrated: bool = False) -> PackPlan:
    """Choose a packed format per weight for `quant` (see `QUANTS`) and name what changes.

    `none` keeps the values (a GGUF's dequantised ones as float32); `auto` keeps GGUF blocks as they are and
    packs floats to the source's own default. Norms and routers stay float32. `is_calibrated`: a `Rounding`
    makes the 4-bit codes.
    """
    if quant not in QUANTS:
        raise ConfigError(f"quant must be one of {', '.join(QUANTS)}, got '{quant}'", field="quant")
    chosen: dict[str, tuple[tuple[int, ...], str]] = {}
    changes: dict[tuple[str, str], int] = {}
    floats_as = _CALIBRATED_AS if is_calibrated else _FLOATS_AS
    for name, tensor in source.tensors.items():
        packed_format = _packed_format(name, tensor, quant, source.default_quant, floats_as)
        chosen[name] = (tensor.shape, packed_format)
        if len(tensor.shape) == 2 and not _keeps_values(tensor.format, packed_format):
            key = (tensor.format, packed_format)
            changes[key] = changes.get(key, 0) + 1
    slots, size = plan_slots(chosen)
    names = {packed: quant for quant, packed in floats_as.items()}
    notes = tuple(
        f"{count} {'matrix' if count == 1 else 'matrices'} converted from {old} to {names.get(new, new)}"
        for (old, new), count in changes.items()
    )
    return PackPlan(slots, size, notes)


def _packed_format(
    name: str, tensor: SourceTensor, quant: str, default: str, floats_as: Mapping[str, str]
) -> str:
    stored = FORMATS[tensor.format]
    if len(tensor.shape) == 1 or name.endswith(".router"):
        return "f32"
    own = tensor.format.lower() if not stored.is_quantised else packed_format_of(stored.ggml_id or 0)
    if quant == "none":
        return "f32" if stored.is_quantised else tensor.format.lower()
    if quant == "auto":
        if stored.is_quantised and own is not None:
            return own
        quant = default if default in ("q4", "q8", "bf16") else tensor.format.lower()
    if quant == "q4" and name in ("tok_embeddings", "output"):
        quant = (
            "q8"  # one row per token is read of the table, and the head decides the token: 8 bits cost little
        )
    if own is not None and stored.is_quantised and (own == quant or (quant == "q4" and own in _FOUR_BITS)):
        return own
    return floats_as.get(quant, quant)


def _keeps_values(stored: str, packed_format: str) -> bool:
    if packed_format == "f32" or packed_format == stored.lower():
        return True
    ggml_id = FORMATS[stored].ggml_id
    return FORMATS[stored].is_quantised and ggml_id is not None and packed_format_of(ggml_id) == packed_format


def pack_weights(
    source: ModelSource,
    quant: str,
    ops: CpuOps,
    progress: Progress | None = None,
    rounding: Rounding | None = None,
) -> PackedWeights:
    """Read, convert and pack every weight of a source; floats that become 4 bits go through `rounding` first.

    Raises ModelFileError naming the tensor when a value is NaN or infinite or does not fit its format.
    """
    plan = plan_packing(source, quant, rounding is not None)
    memory = arena(plan.size_bytes)
    done = 0
    total = sum(tensor.size_bytes for tensor in source.tensors.values())
    for slot in plan.slots:
        tensor = source.tensors[slot.name]
        out = memory[slot.offset : slot.offset + slot.size_bytes]
        pack_tensor(
            source, slot, tensor, ops, out, rounding if slot.packed_format == _CALIBRATED_AS["q4"] else None
        )
        done += tensor.size_bytes
        if progress is not None:
            progress("packing weights", done / max(total, 1))
    return PackedWeights(plan, memory)


def pack_tensor(
    source: ModelSource,
    slot: Slot,
    tensor: SourceTensor,
    ops: CpuOps,
    out: Bytes,
    rounding: Rounding | None = None,
) -> None:
    """Write one weight of a source as panels to `out`, of the slot's size; see `pack_weights`."""
    if len(slot.shape) == 1:
        values = tensor.floats(0, slot.shape[0])
        if not np.isfinite(values).all():
            raise not_finite(source, slot)
        out[:] = values.view(np.uint8)
        return
    num_rows, num_columns = slot.shape
    ggml_id = FORMATS[tensor.format].ggml_id
    repacks = _keeps_values(tensor.format, slot.packed_format) and FORMATS[tensor.format].is_quantised
    repacks = repacks and slot.packed_format != "f32"
    step = max(16, SLICE_BYTES // (4 * num_columns) // 16 * 16)
    panel = packed_size(slot.packed_format, 16, num_columns)
    importance = column_importance(source, slot.name) if slot.packed_format == _FLOATS_AS["q4"] else None
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        target = out[start // 16 * panel :]
        if repacks:
            assert ggml_id is not None
            raw = np.ascontiguousarray(tensor.raw(start, stop))
            fine = ops.pack_blocks(ggml_id, raw, num_columns, target)
        else:
            rows: npt.NDArray[np.float32] = np.ascontiguousarray(tensor.floats(start, stop))
            blocks = None if rounding is None or not np.isfinite(rows).all() else rounding(slot.name, rows)
            if blocks is None:
                fine = ops.pack_floats(slot.packed_format, rows, target, importance)
            else:
                fine = ops.pack_blocks(_IQ4_NL, blocks, num_columns, target)
        if not fine:
            raise not_finite(source, slot)


def not_finite(source: ModelSource, slot: Slot) -> ModelFileError:
    """Return the error of a weight with a value that its format cannot hold."""
    return ModelFileError(
        f"{source.path}: weight {slot.name} has a value that is NaN, infinite or too large for "
        f"{slot.packed_format}; the file is damaged, fetch it again",
        field=slot.name,
    )
