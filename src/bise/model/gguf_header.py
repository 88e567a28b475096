"""The header of a GGUF file: key/value pairs and tensor directory, read in checked arithmetic.

Every count and length in the file is compared with the bytes that are left before anything is allocated or
walked, so that a damaged or hostile header costs no more than its own size. No key's meaning is known here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bise.diskfile import read_at
from bise.errors import ModelFileError, quoted
from bise.formats import FORMATS, FORMATS_BY_GGML_ID, Format

MAX_HEADER_BYTES = 256 << 20
"""Key/value pairs and tensor directory together; a 128k vocabulary with its merges needs about 8 MiB."""
MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_STRINGS = 1 << 20
"""Strings, arrays and their numbers in all arrays together; the largest vocabularies have about 800,000."""
MAX_ARRAY_DEPTH = 3
MAX_KEYS = 1 << 16
MAX_KEY_BYTES = 65535
MAX_TENSORS = 1 << 18
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

_FIRST_READ = 1 << 20
_SCALARS: Mapping[int, tuple[str, struct.Struct]] = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_UNSUPPORTED_TYPES: Mapping[int, str] = {
    4: "Q4_2 (removed)",
    5: "Q4_3 (removed)",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4 (removed)",
    32: "Q4_0_4_8 (removed)",
    33: "Q4_0_8_8 (removed)",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the tensor directory, checked against the file's size."""

    name: str
    shape: tuple[int, ...]
    """Slowest axis first (the reverse of the file's order)."""
    format: Format
    offset: int
    """Absolute position in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    version: int
    metadata: Mapping[str, object]
    """bool, int, float or str; a list[str]; a numpy array of numbers; plain lists for nested arrays."""
    tensors: Mapping[str, TensorEntry]
    """By name, in file order."""


def read_header(path: Path, descriptor: int, size: int) -> GgufHeader:
    """Return the header of an open GGUF file of `size` bytes.

    Raises `ModelFileError`, which names `path` and the key or tensor at fault.
    """
    cursor = _Cursor(path, descriptor, size)
    version = _read_version(cursor)
    tensor_count = cursor.u64("tensor count")
    key_count = cursor.u64("key count")
    if key_count > MAX_KEYS or key_count * 14 > cursor.left:
        raise cursor.error(
            f"the key count {key_count} does not fit the {cursor.left} bytes left", "key count"
        )
    if tensor_count > MAX_TENSORS or tensor_count * 33 > cursor.left:
        raise cursor.error(
            f"the tensor count {tensor_count} does not fit the {cursor.left} bytes left", "tensor count"
        )
    metadata: dict[str, object] = {}
    types: dict[str, int] = {}
    for _ in range(key_count):
        key = _read_key(cursor)
        if key in metadata:
            raise cursor.error(f"the key {key} occurs twice", key)
        types[key] = cursor.u32(key)
        metadata[key] = _read_value(cursor, types[key], key)
    alignment = _alignment(cursor, metadata, types)
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(version, metadata, _place(cursor, entries, start, alignment))


class _Cursor:
    """A position in the header; bytes are fetched in growing steps as they are asked for and exist."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._limit = min(size, MAX_HEADER_BYTES)
        self.buffer = b""
        self.position = 0
        self.elements_left = MAX_ARRAY_STRINGS

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return self._size - self.position

    @property
    def size(self) -> int:
        return self._size

    def error(self, message: str, field: str) -> ModelFileError:
        """Return the error to raise: it names the file, and `field` is the key or tensor at fault."""
        return ModelFileError(f"{self._path}: {message}", field=field or "name")

    def require(self, end: int, what: str) -> None:
        """Make the bytes before `end` available in `buffer`."""
        if end <= len(self.buffer):
            return
        if end > self._size:
            beyond = f"reaches {end - self._size} bytes past the end of the file"
            raise self.error(f"{what} {beyond}: it is cut short or damaged; fetch it again", what)
        if end > self._limit:
            raise self.error(f"{what} reaches past {MAX_HEADER_BYTES >> 20} MiB of header", what)
        target = min(self._limit, max(end, 2 * len(self.buffer), _FIRST_READ))
        have = len(self.buffer)
        self.buffer += read_at(self._descriptor, self._path, have, target - have)

    def skip(self, length: int, what: str) -> int:
        """Step over `length` bytes and return where they start in `buffer`."""
        start = self.position
        self.require(start + length, what)
        self.position = start + length
        return start

    def u32(self, what: str) -> int:
        start = self.skip(4, what)
        return int(_U32.unpack_from(self.buffer, start)[0])

    def u64(self, what: str) -> int:
        start = self.skip(8, what)
        return int(_U64.unpack_from(self.buffer, start)[0])

    def text(self, what: str, limit: int) -> str:
        """Return a string of at most `limit` bytes; UTF-8 is demanded."""
        length = self.u64(what)
        if length > limit or length > self.left:
            raise self.error(
                f"{what} has a string of {length} bytes; {min(limit, self.left)} at most fit", what
            )
        start = self.skip(length, what)
        try:
            return self.buffer[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} has a string that is not UTF-8", what) from error


def _read_version(cursor: _Cursor) -> int:
    if cursor.size < 24:
        raise cursor.error(
            f"is not a GGUF file: {cursor.size} bytes are less than its smallest header", "magic"
        )
    cursor.skip(4, "magic")
    magic = cursor.buffer[:4]
    if magic == b"FUGG":
        raise cursor.error(
            "is a GGUF file with its bytes swapped (big-endian); convert it to little-endian", "magic"
        )
    if magic != b"GGUF":
        raise cursor.error(f"is not a GGUF file: it starts with {quoted(magic)}", "magic")
    version = cursor.u32("version")
    if version in (2, 3):
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        raise cursor.error(
            "is a big-endian GGUF file, which is not supported; convert it to little-endian "
            "(gguf-convert-endian of the gguf package)",
            "version",
        )
    if version == 1:
        raise cursor.error(
            "is GGUF version 1 of 2023, which is not supported; convert the original model again", "version"
        )
    raise cursor.error(f"has GGUF version {version}; supported are 2 and 3", "version")


def _read_key(cursor: _Cursor) -> str:
    key = cursor.text("a key name", MAX_KEY_BYTES)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise cursor.error(f"the key name {quoted(key)} is not printable ASCII", "key name")
    return key


def _read_value(cursor: _Cursor, kind: int, key: str) -> object:
    if kind in _SCALARS:
        scalar = _SCALARS[kind][1]
        start = cursor.skip(scalar.size, key)
        (value,) = scalar.unpack_from(cursor.buffer, start)
        if kind != _BOOL:
            return value
        if value > 1:
            raise cursor.error(f"{key} is a bool with the value {value}; only 0 and 1 are valid", key)
        return bool(value)
    if kind == _STRING:
        return cursor.text(key, MAX_STRING_BYTES)
    if kind == _ARRAY:
        return _read_array(cursor, key, 1)
    raise cursor.error(f"{key} has the unknown value type {kind}", key)


def _read_array(cursor: _Cursor, key: str, depth: int) -> object:
    kind = cursor.u32(key)
    count = cursor.u64(key)
    if kind in _SCALARS:
        if depth == 1:
            return _read_numbers(cursor, kind, count, key)
        # Inner arrays become plain lists, whose values cost far more memory than the file's bytes.
        _spend(cursor, count, _SCALARS[kind][1].size, key)
        return _read_numbers(cursor, kind, count, key).tolist()
    if kind not in (_STRING, _ARRAY):
        raise cursor.error(f"{key} is an array of the unknown value type {kind}", key)
    _spend(cursor, count, 8 if kind == _STRING else 12, key)
    if kind == _STRING:
        return _read_strings(cursor, count, key)
    if depth >= MAX_ARRAY_DEPTH:
        raise cursor.error(f"{key} has arrays nested deeper than {MAX_ARRAY_DEPTH} levels", key)
    return [_read_array(cursor, key, depth + 1) for _ in range(count)]


def _spend(cursor: _Cursor, count: int, size: int, key: str) -> None:
    """Refuse `count` elements of at least `size` bytes unless the bytes left and the budget can hold them."""
    fit = min(cursor.left // size, cursor.elements_left)
    if count > fit:
        why = ": the file is cut short or damaged; fetch it again" if fit < cursor.elements_left else ""
        raise cursor.error(f"{key} is an array of {count} elements; {fit} at most fit{why}", key)
    cursor.elements_left -= count


def _read_numbers(cursor: _Cursor, kind: int, count: int, key: str) -> npt.NDArray[np.generic]:
    name, scalar = _SCALARS[kind]
    if count > cursor.left // scalar.size:
        fit = cursor.left // scalar.size
        raise cursor.error(f"{key} is an array of {count} elements; {fit} at most fit the bytes left", key)
    start = cursor.skip(count * scalar.size, key)
    dtype = np.dtype(scalar.format)
    values = np.frombuffer(cursor.buffer, dtype, count, start).copy()
    if name != "bool":
        return values
    if count and int(values.max()) > 1:
        raise cursor.error(f"{key} is an array of bools with the value {int(values.max())}", key)
    return values.astype(np.bool_)


def _read_strings(cursor: _Cursor, count: int, key: str) -> list[str]:
    """Return `count` strings; a plain loop over locals, since a vocabulary has hundreds of thousands."""
    result: list[str] = []
    unpack = _U64.unpack_from
    buffer, position = cursor.buffer, cursor.position
    for index in range(count):
        start = position + 8
        if start > len(buffer):
            cursor.require(start, key)
            buffer = cursor.buffer
        (length,) = unpack(buffer, position)
        position = start + length
        if position > len(buffer):
            if length > MAX_STRING_BYTES:
                raise cursor.error(f"{key}[{index}] has {length} bytes; {MAX_STRING_BYTES} at most fit", key)
            cursor.require(position, key)
            buffer = cursor.buffer
        try:
            result.append(buffer[start:position].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise cursor.error(f"{key}[{index}] is not UTF-8", key) from error
    cursor.position = position
    return result


def _alignment(cursor: _Cursor, metadata: Mapping[str, object], types: Mapping[str, int]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    value = metadata[key]
    if types[key] != 4 or not isinstance(value, int):
        raise cursor.error(f"{key} must be a u32", key)
    if value < 1 or value & (value - 1):
        raise cursor.error(f"{key} must be a power of two, got {value}", key)
    return value


def _read_entry(cursor: _Cursor) -> TensorEntry:
    """Read one line of the tensor directory; its offset is still relative to the data section."""
    name = cursor.text("a tensor name", MAX_TENSOR_NAME_BYTES)
    shown = quoted(name)
    num_dims = cursor.u32(f"tensor {shown}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {shown} has {num_dims} dimensions; 1 to {MAX_DIMS} are valid", name)
    dims = [cursor.u64(f"tensor {shown}") for _ in range(num_dims)]
    type_id = cursor.u32(f"tensor {shown}")
    offset = cursor.u64(f"tensor {shown}")
    entry = FORMATS_BY_GGML_ID.get(type_id)
    if entry is None:
        kind = _UNSUPPORTED_TYPES.get(type_id, "unknown")
        raise cursor.error(
            f"tensor {shown} has type {type_id} ({kind}); supported are {', '.join(FORMATS)}; "
            "use a file quantised to one of these",
            name,
        )
    if 0 in dims:
        raise cursor.error(f"tensor {shown} has a dimension of 0", name)
    if dims[0] % entry.block_length:
        raise cursor.error(
            f"tensor {shown} has rows of {dims[0]} values, not whole {entry.name} blocks", name
        )
    size = math.prod(dims[1:]) * entry.row_bytes(dims[0])
    if size > cursor.size:
        raise cursor.error(f"tensor {shown} has the shape {dims}, larger than the file", name)
    return TensorEntry(name, tuple(reversed(dims)), entry, offset, size)


def _place(cursor: _Cursor, entries: list[TensorEntry], start: int, alignment: int) -> dict[str, TensorEntry]:
    """Return the entries with absolute offsets; they must fill the data section, no overlap, hole or rest."""
    placed: dict[str, TensorEntry] = {}
    for entry in entries:
        shown = quoted(entry.name)
        if entry.name in placed:
            raise cursor.error(f"the tensor {shown} occurs twice", entry.name)
        if entry.offset % alignment:
            raise cursor.error(
                f"tensor {shown} has offset {entry.offset}, not a multiple of {alignment}", entry.name
            )
        position = start + entry.offset
        if position + entry.size > cursor.size:
            raise cursor.error(
                f"tensor {shown} ends {position + entry.size - cursor.size} bytes past the end of the file; "
                "the file is cut short or damaged, fetch it again",
                entry.name,
            )
        placed[entry.name] = TensorEntry(entry.name, entry.shape, entry.format, position, entry.size)
    end, last = start, "the header"
    for entry in sorted(placed.values(), key=lambda item: (item.offset, item.size)):
        shown = quoted(entry.name)
        if entry.offset < end:
            raise cursor.error(f"tensor {shown} overlaps {last}", entry.name)
        if entry.offset > end:
            raise cursor.error(
                f"{entry.offset - end} bytes before tensor {shown} belong to no tensor", entry.name
            )
        end, last = -(-(entry.offset + entry.size) // alignment) * alignment, f"tensor {shown}"
    if cursor.size > end:
        raise cursor.error(
            f"{cursor.size - end} bytes after the last tensor belong to no tensor", "file size"
        )
    return placed
