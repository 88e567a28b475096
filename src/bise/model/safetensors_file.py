"""Reading safetensors files: the header, strictly; rows, on demand and into fresh arrays.

Rows are read with positioned reads, not through a memory map: a file that is cut while in use gives an error
instead of a SIGBUS, and peak memory does not grow with the file. It knows nothing of models.

Format: 8 bytes N (little-endian), N bytes of JSON, then one buffer that the tensors' `data_offsets` tile.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import numpy.typing as npt

from bise.diskfile import open_regular, read_at, read_into
from bise.errors import ModelFileError, quoted
from bise.jsonfile import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_VALUES = 1_000_000
"""JSON values in a header: about 70,000 tensors, forty times what Mixtral 8x22B has in all its files."""
MAX_RANK = 8

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype of the format, in bits; weights may use those of `FLOAT_BYTES` only."""
FLOAT_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

_INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header; `start` and `stop` count from the start of the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the buffer."""
        return self.stop - self.start


def parse_header(
    header: bytes, buffer_bytes: int, origin: str
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return (tensors by name in buffer order, `__metadata__`) of a header over a buffer of `buffer_bytes`.

    Raises `ModelFileError`, naming `origin` and the tensor, unless every dtype is known, dtype x shape is the
    number of bytes, and the tensors tile the buffer without overlap, hole or tail.
    """
    if not header.startswith(b"{"):
        raise ModelFileError(f"{origin}: the safetensors header does not start with '{{'", field=origin)
    # Writers pad with spaces up to the limit; there is no point in parsing 100 MB of them.
    fields = parse_json(header.rstrip(b" "), f"{origin}: safetensors header", max_values=MAX_HEADER_VALUES)
    if not isinstance(fields, dict):
        raise ModelFileError(f"{origin}: the safetensors header is not a JSON object", field=origin)
    fields = cast(dict[str, object], fields)
    metadata = _metadata(fields.pop("__metadata__", {}), origin)
    entries = [_entry(name, value, origin) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            _refuse(
                origin,
                entry.name,
                f"data_offsets [{entry.start}, {entry.stop}] {fault} (expected {position})",
            )
        position = entry.stop
    if position != buffer_bytes:
        raise ModelFileError(
            f"{origin} holds {buffer_bytes} bytes of tensor data, its header describes {position}: "
            f"the file is {'cut short' if position > buffer_bytes else 'too long'}; fetch it again",
            field=origin,
        )
    return {entry.name: entry for entry in entries}, metadata


def _metadata(value: object, origin: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(item, str) for item in cast(dict[str, object], value).values()
    ):
        raise ModelFileError(f"{origin}: __metadata__ must map text to text", field="__metadata__")
    return cast(dict[str, str], value)


def _entry(name: str, value: object, origin: str) -> TensorEntry:
    if not isinstance(value, dict) or set(cast(dict[str, object], value)) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        _refuse(origin, name, "must be an object of exactly dtype, shape and data_offsets")
    fields = cast(dict[str, object], value)
    dtype = fields["dtype"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        _refuse(origin, name, f"has the unknown dtype {quoted(dtype)}")
    shape = _naturals(fields["shape"])
    if shape is None or len(shape) > MAX_RANK:
        _refuse(
            origin, name, f"shape must be at most {MAX_RANK} integers >= 0, got {quoted(fields['shape'])}"
        )
    offsets = _naturals(fields["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(origin, name, f"data_offsets must be [start, stop], got {quoted(fields['data_offsets'])}")
    total_bits = bits
    for size in shape:
        total_bits *= size
        if total_bits > _INT64_MAX:
            _refuse(origin, name, f"shape {quoted(list(shape))} overflows")
    if total_bits != 8 * (offsets[1] - offsets[0]):
        _refuse(
            origin,
            name,
            f"dtype {dtype} x shape {quoted(list(shape))} needs {total_bits / 8:g} bytes, "
            f"data_offsets span {offsets[1] - offsets[0]}",
        )
    return TensorEntry(name, cast(str, dtype), shape, offsets[0], offsets[1])


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a list of integers in [0, 2^63) as a tuple, None for anything else (true is not an integer)."""
    if not isinstance(value, list):
        return None
    items = cast(list[object], value)
    if all(type(item) is int and 0 <= item <= _INT64_MAX for item in items):
        return tuple(cast(list[int], items))
    return None


def _refuse(origin: str, name: str, reason: str) -> NoReturn:
    raise ModelFileError(f"{origin}: tensor {quoted(name)} {reason}", field=name)


class SafetensorsFile:
    """An open file: its header is read and checked at once, its tensors when asked for."""

    def __init__(self, path: Path) -> None:
        """Open `path` and check its header; raises `ModelFileError`."""
        self.path = path
        self._descriptor, size = open_regular(path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        if size < 8:
            raise ModelFileError(
                f"{path} has {size} bytes, too few for a safetensors header", field=str(path)
            )
        header_bytes = int.from_bytes(read_at(self._descriptor, path, 0, 8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ModelFileError(
                f"{path}: header length {header_bytes} exceeds the limit of {MAX_HEADER_BYTES}: "
                "this is not a safetensors file or it is damaged",
                field=str(path),
            )
        if header_bytes > size - 8:
            raise ModelFileError(
                f"{path}: header length {header_bytes} exceeds the {size - 8} bytes left; fetch it again",
                field=str(path),
            )
        self._base = 8 + header_bytes
        header = read_at(self._descriptor, path, 8, header_bytes)
        self.entries, self.metadata = parse_header(header, size - self._base, str(path))

    def close(self) -> None:
        """Close the file; reading from it afterwards is an error."""
        self._close()

    def read(self, entry: TensorEntry, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return bytes [start, stop) of a tensor as a fresh array."""
        target = np.empty(stop - start, np.uint8)
        self.read_into(entry, start, target)
        return target

    def read_into(self, entry: TensorEntry, start: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` with the bytes of a tensor from `start` on."""
        assert 0 <= start <= start + len(target) <= entry.size_bytes
        if not self._close.alive:
            raise ModelFileError(f"{self.path} is closed", field=str(self.path))
        read_into(self._descriptor, self.path, self._base + entry.start + start, target.data)


class StoredTensor:
    """A matrix [N, K] or a vector [K] inside a file: a `SourceTensor`.

    The rows may be a part of a larger stored tensor (stacked experts): it starts at row `first_row` of the
    stored tensor flattened to rows of K. With `pair_width` D > 0, rows of each group of D are stored as
    neighbouring rotary pairs and returned as halves: row j of a group is stored row 2j, D/2 + j is 2j + 1.

    Example, D = 4: stored rows [0 1 2 3 | 4 5 6 7] are returned as [0 2 1 3 | 4 6 5 7].
    """

    def __init__(
        self,
        file: SafetensorsFile,
        entry: TensorEntry,
        shape: tuple[int, ...],
        *,
        first_row: int = 0,
        pair_width: int = 0,
    ) -> None:
        """Take a tensor of F32, F16 or BF16; `shape` has been checked against the stored one."""
        self._file = file
        self._entry = entry
        self._shape = shape
        self._pair_width = pair_width
        self._row_bytes = FLOAT_BYTES[entry.dtype] * (shape[1] if len(shape) == 2 else 1)
        self._offset = first_row * self._row_bytes
        assert self._offset + shape[0] * self._row_bytes <= entry.size_bytes
        assert not pair_width or (pair_width % 2 == 0 and shape[0] % pair_width == 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `SourceTensor.shape`."""
        return self._shape

    @property
    def format(self) -> str:
        """See `SourceTensor.format`: F32, F16 or BF16."""
        return self._entry.dtype

    @property
    def size_bytes(self) -> int:
        """See `SourceTensor.size_bytes`."""
        return self._shape[0] * self._row_bytes

    def raw(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """See `SourceTensor.raw`."""
        assert 0 <= start <= stop <= self._shape[0]
        width = self._pair_width
        if not width or start == stop:
            return self._stored_rows(start, stop)
        # Whole heads are read, so that the rows of a pair are at hand whichever half is asked for.
        low, high = start - start % width, -(-stop // width) * width
        rows = np.arange(start, stop)
        inside = rows % width
        source = rows - inside + 2 * (inside % (width // 2)) + inside // (width // 2)
        return self._stored_rows(low, high)[source - low]

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """See `SourceTensor.floats`; the three formats convert exactly."""
        rows = self.raw(start, stop)
        if self.format == "F32":
            values = rows.view("<f4").astype(np.float32, copy=False)
        elif self.format == "F16":
            values = rows.view("<f2").astype(np.float32)
        else:
            values = (rows.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values.reshape(stop - start, *self._shape[1:])

    def _stored_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        data = self._file.read(
            self._entry, self._offset + start * self._row_bytes, self._offset + stop * self._row_bytes
        )
        return data.reshape(stop - start, self._row_bytes)
