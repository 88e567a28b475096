"""GGUF files, whole or split, as a `ModelSource`: names, RoPE row order and stacked experts become bise's.

Only headers are read on opening. Weights are read row by row at explicit file positions, never mapped: a file
that is cut while in use gives an error, and memory does not grow with the file.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig
from bise.diskfile import open_regular, read_into, resolve_inside
from bise.errors import ModelFileError, quoted
from bise.formats import Format
from bise.kernels.dequant import dequantize
from bise.model.gguf_config import read_config
from bise.model.gguf_header import GgufHeader, TensorEntry, read_header
from bise.model.source import ModelSource, SourceTensor
from bise.model.transformer import weight_shapes

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 4096
_TOP_NAMES: Mapping[str, str] = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "router": "ffn_gate_inp",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}
_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDINGS = "token_embd.weight"
_VECTOR_FORMATS = ("F32", "F16", "BF16")


class GgufFile:
    """One open file of a GGUF model; it is closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        """Open `path` and read its header."""
        self.path = path
        self._descriptor, size = open_regular(path)
        weakref.finalize(self, os.close, self._descriptor)
        self.header: GgufHeader = read_header(path, self._descriptor, size)

    def read(self, offset: int, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        """Return bytes [rows, row_bytes] from `offset`; `ModelFileError` when the file has been cut."""
        target = np.empty(rows * row_bytes, np.uint8)
        read_into(self._descriptor, self.path, offset, target.data)
        return target.reshape(rows, row_bytes)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A weight in a GGUF file, or one expert's slice of a stacked one; see `SourceTensor`."""

    file: GgufFile
    shape: tuple[int, ...]
    """[N, K] or [K]."""
    storage: Format
    offset: int
    """Absolute position of the first row."""
    head_dim: int = 0
    """Non-zero where the file has the two halves of each head interleaved (queries and keys)."""

    @property
    def format(self) -> str:
        """Name of the storage format."""
        return self.storage.name

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.storage.row_bytes(self.shape[1] if len(self.shape) == 2 else 1)

    def raw(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return rows [start, stop) as stored, in bise's order; at most two heads more are read."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} are not inside 0 to {self.shape[0]}")
        row_bytes = self._row_bytes
        if not self.head_dim:
            return self.file.read(self.offset + start * row_bytes, stop - start, row_bytes)
        first = start // self.head_dim * self.head_dim
        last = -(-stop // self.head_dim) * self.head_dim
        heads = self.file.read(self.offset + first * row_bytes, last - first, row_bytes)
        return heads[paired_rows(start, stop, self.head_dim) - first]

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows [start, stop) dequantised, [stop - start, K] ([stop - start] for a vector)."""
        values = dequantize(self.storage.name, self.raw(start, stop))
        return values if len(self.shape) == 2 else values.reshape(-1)


def paired_rows(start: int, stop: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Return the file's row of each of bise's rows [start, stop) of a query or key projection.

    The file has dimensions (0, D/2), (1, D/2 + 1), ... of a head side by side. Example, head_dim 4: bise's
    rows 0 1 2 3 | 4 5 6 7 are the file's rows 0 2 1 3 | 4 6 5 7.
    """
    rows = np.arange(start, stop, dtype=np.int64)
    head, within = np.divmod(rows, head_dim)
    half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def open_gguf(path: Path) -> ModelSource:
    """Return the model of a .gguf file, or of the split model whose first part `path` is; reads headers only.

    Raises `ModelFileError` naming the file and the key or tensor for anything malformed, missing, left over
    or unsupported.
    """
    first = GgufFile(path)
    files = [first, *_other_parts(first)]
    tensors = _all_tensors(files)
    metadata = first.header.metadata
    config = _config(path, metadata, tensors)
    weights = _Weights(path, config, tensors)
    mapped = {name: weights.take(name, shape) for name, shape in weight_shapes(config).items()}
    weights.refuse_unused()
    return ModelSource(
        path=path,
        kind="gguf",
        config=config,
        tensors=mapped,
        metadata=metadata,
        name=_text(metadata, "general.name") or _text(metadata, "general.basename") or path.stem,
        licence=_text(metadata, "general.license") or _text(metadata, "general.license.name"),
        default_quant=_default_quant(mapped),
    )


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(key)
    if not isinstance(value, str):
        return None
    return "".join(char for char in value[:200] if char.isprintable()) or None


def _other_parts(first: GgufFile) -> list[GgufFile]:
    """Open parts 2 to N of a split model; [] for a whole one."""
    count = _split_number(first, "split.count", 1)
    if count <= 1:
        return []
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if count > _MAX_PARTS or match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{first.path}: split.count is {count}, so its name must end in -00001-of-{count:05d}.gguf",
            field="split.count",
        )
    if _split_number(first, "split.no", 0) != 0 or int(match["number"]) != 1:
        raise ModelFileError(
            f"{first.path}: is part {match['number']} of a split model; "
            f"open {match['stem']}-00001-of-{count:05d}.gguf",
            field="split.no",
        )
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(2, count + 1)]
    parts = [GgufFile(resolve_inside(first.path.parent, name)) for name in names]
    for index, part in enumerate(parts, 1):
        if (number := _split_number(part, "split.no", -1)) != index:
            raise ModelFileError(f"{part.path}: split.no is {number}, not {index}", field="split.no")
        if (seen := _split_number(part, "split.count", 0)) != count:
            raise ModelFileError(f"{part.path}: split.count is {seen}, not {count}", field="split.count")
        for key, value in part.header.metadata.items():
            if not key.startswith("split.") and not _same(value, first.header.metadata.get(key)):
                raise ModelFileError(f"{part.path}: {key} differs from the first part's", field=key)
    return parts


def _split_number(file: GgufFile, key: str, default: int) -> int:
    value = file.header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFileError(f"{file.path}: {key} must be an integer, got {quoted(value)}", field=key)
    return value


def _same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return np.array_equal(cast(npt.NDArray[np.generic], left), cast(npt.NDArray[np.generic], right))
    return type(left) is type(right) and left == right


def _all_tensors(files: list[GgufFile]) -> dict[str, tuple[GgufFile, TensorEntry]]:
    tensors: dict[str, tuple[GgufFile, TensorEntry]] = {}
    for file in files:
        for name, entry in file.header.tensors.items():
            if name in tensors:
                raise ModelFileError(
                    f"{file.path}: the tensor {quoted(name)} is also in {tensors[name][0].path.name}",
                    field=name,
                )
            tensors[name] = (file, entry)
    total = _split_number(files[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelFileError(
            f"{files[0].path}: split.tensors.count is {total}, but the parts have {len(tensors)} tensors",
            field="split.tensors.count",
        )
    if not tensors:
        raise ModelFileError(f"{files[0].path}: has no tensors (a vocabulary only)", field="tensor count")
    return tensors


def _config(
    path: Path, metadata: Mapping[str, object], tensors: Mapping[str, tuple[GgufFile, TensorEntry]]
) -> ModelConfig:
    """Return the configuration, checked against the vocabulary in the metadata."""
    version = metadata.get("general.quantization_version", 2)
    if version != 2:
        raise ModelFileError(
            f"{path}: general.quantization_version is {quoted(version)}; only 2 is supported",
            field="general.quantization_version",
        )
    embeddings = tensors.get(_EMBEDDINGS)
    if embeddings is None:
        raise ModelFileError(f"{path}: the tensor {_EMBEDDINGS} is missing", field=_EMBEDDINGS)
    vocab_size = embeddings[1].shape[0]
    config = read_config(
        path,
        metadata,
        vocab_size,
        tied="output.weight" not in tensors,
        rope_factors=_rope_factors(path, tensors),
    )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        count = len(cast(list[object], tokens))
        if count != vocab_size:
            raise ModelFileError(
                f"{path}: tokenizer.ggml.tokens has {count} tokens, but {_EMBEDDINGS} has {vocab_size} rows",
                field="tokenizer.ggml.tokens",
            )
    return config


def _rope_factors(path: Path, tensors: Mapping[str, tuple[GgufFile, TensorEntry]]) -> tuple[float, ...]:
    if _ROPE_FACTORS not in tensors:
        return ()
    file, entry = tensors[_ROPE_FACTORS]
    if entry.format.name != "F32" or len(entry.shape) != 1 or entry.shape[0] > 4096:
        raise ModelFileError(
            f"{path}: {_ROPE_FACTORS} must be a F32 vector of head_dim / 2 values, "
            f"got {entry.format.name} {list(entry.shape)}",
            field=_ROPE_FACTORS,
        )
    factors = GgufTensor(file, entry.shape, entry.format, entry.offset).floats(0, entry.shape[0])
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelFileError(f"{path}: {_ROPE_FACTORS} must hold positive numbers", field=_ROPE_FACTORS)
    return tuple(factors.tolist())


class _Weights:
    """The file's tensors, taken one by one under bise's names."""

    def __init__(
        self, path: Path, config: ModelConfig, tensors: Mapping[str, tuple[GgufFile, TensorEntry]]
    ) -> None:
        self._path = path
        self._config = config
        self._tensors = tensors
        self._used = {_ROPE_FACTORS}
        # Refused before any name is built: a damaged count must not cost a dictionary of millions.
        if len(tensors) < 9 * config.num_layers + 2:
            raise ModelFileError(
                f"{path}: has {len(tensors)} tensors, too few for block_count {config.num_layers}; "
                "some are missing",
                field="block_count",
            )

    def take(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """Return the weight that bise calls `name`; its shape and format are checked."""
        parts = name.split(".")
        if len(parts) == 1:
            return self._whole(f"{_TOP_NAMES[name]}.weight", shape)
        block, kind = f"blk.{parts[1]}", parts[-1]
        if len(parts) == 5:
            return self._expert(f"{block}.{_LAYER_NAMES[kind]}", int(parts[3]), shape)
        head_dim = self._config.head_dim if kind in ("wq", "wk") else 0
        return self._whole(f"{block}.{_LAYER_NAMES[kind]}.weight", shape, head_dim)

    def refuse_unused(self) -> None:
        """Raise when the file has tensors that no part of the network takes."""
        extra = [name for name in self._tensors if name not in self._used]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            shown = ", ".join(quoted(name) for name in extra[:3])
            raise ModelFileError(
                f"{self._path}: has tensors that are no part of such a network: {shown}{more}",
                field=extra[0],
            )

    def _whole(self, name: str, shape: tuple[int, ...], head_dim: int = 0) -> GgufTensor:
        file, entry = self._entry(name, shape)
        return GgufTensor(file, shape, entry.format, entry.offset, head_dim)

    def _expert(self, stem: str, expert: int, shape: tuple[int, ...]) -> GgufTensor:
        """Return one expert's slice of a stacked tensor, or its own tensor in files of early 2024."""
        stacked = f"{stem}_exps.weight"
        if stacked not in self._tensors:
            single = f"{stem}.{expert}.weight"
            return self._whole(single if single in self._tensors else stacked, shape)
        file, entry = self._entry(stacked, (self._config.num_experts, *shape))
        size = entry.size // self._config.num_experts
        return GgufTensor(file, shape, entry.format, entry.offset + expert * size)

    def _entry(self, name: str, shape: tuple[int, ...]) -> tuple[GgufFile, TensorEntry]:
        found = self._tensors.get(name)
        if found is None:
            raise ModelFileError(f"{self._path}: the tensor {name} is missing", field=name)
        file, entry = found
        if entry.shape != shape:
            raise ModelFileError(
                f"{file.path}: the tensor {name} has shape {list(entry.shape)}; "
                f"the configuration needs {list(shape)}",
                field=name,
            )
        if len(shape) == 1 and entry.format.name not in _VECTOR_FORMATS:
            raise ModelFileError(
                f"{file.path}: the tensor {name} is {entry.format.name}; a vector must be F32, F16 or BF16",
                field=name,
            )
        self._used.add(name)
        return found


def _default_quant(tensors: Mapping[str, SourceTensor]) -> str:
    """Return q4 when most of the layers' matrix bytes are stored in 5 bits per value or fewer, else q8."""
    narrow = total = 0
    for name, tensor in tensors.items():
        if name.startswith("layers.") and len(tensor.shape) == 2:
            total += tensor.size_bytes
            if 8 * tensor.size_bytes <= 5 * tensor.shape[0] * tensor.shape[1]:
                narrow += tensor.size_bytes
    return "q4" if 2 * narrow > total else "q8"
