"""Packed models on disk: one safetensors file with the panels as bytes and the architecture in its metadata.

The same file is the load-time cache (`BISE_HOME/cache`) and the product of `bise quantize`. It appears under
its final name only when it is complete: written beside it, flushed, renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig, RopeScaling, bise_home, default_threads, state_directory
from bise.diskfile import draft_of, open_regular, read_at, resolve_inside
from bise.errors import BiseError, ConfigError, ModelFileError, UserError, quoted
from bise.jsonfile import kind_of, parse_json, read_json_object
from bise.kernels.cpu import PACKED_FORMATS, CpuOps, arena
from bise.model.pack import (
    PackedWeights,
    PackPlan,
    Progress,
    Rounding,
    Slot,
    pack_weights,
    plan_packing,
    plan_slots,
)
from bise.model.packed_writer import PACK_VERSION, write_packed
from bise.model.safetensors_file import SafetensorsFile
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes

PACKED_FILE = "packed.safetensors"
GGUF_METADATA_FILE = "gguf-metadata.json"
_METADATA_BYTES = 256 << 20
CACHE_MINIMUM_BYTES = 64 << 20
"""Smaller packed models are made anew at each start: packing them takes less time than telling anyone."""

HASH_BYTES = 1 << 20
"""Read at once while hashing: larger pieces are no faster, and the allocator would keep them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "tokenizer.model.v7m1",
    "config.json",
)
"""What the tokenizer and the chat template may be read from; config.json can name the end-of-text tokens."""


class PackedTensor:
    """A packed weight on disk; a `SourceTensor` whose format is the packed one."""

    def __init__(self, file: SafetensorsFile, slot: Slot) -> None:
        self.file = file
        self.slot = slot

    @property
    def shape(self) -> tuple[int, ...]:
        """See `SourceTensor.shape`."""
        return self.slot.shape

    @property
    def format(self) -> str:
        """The packed format's name."""
        return self.slot.packed_format

    @property
    def size_bytes(self) -> int:
        """See `SourceTensor.size_bytes`."""
        return self.slot.size_bytes

    def raw(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Panels have no rows of their own: read `floats` instead."""
        raise ModelFileError(f"{self.file.path} is packed: rows of {self.slot.name} cannot be read as stored")

    def panels(self) -> npt.NDArray[np.uint8]:
        """Return the panels, as bytes in memory of their own."""
        return self.file.read(self.file.entries[self.slot.name], 0, self.slot.size_bytes)

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """See `SourceTensor.floats`."""
        data = self.panels()
        if len(self.shape) == 1:
            return data.view(np.float32)[start:stop]
        ops = CpuOps(1)
        num_rows, num_columns = self.shape
        return ops.unpack(ops.packed(self.format, num_rows, num_columns, data))[start:stop]


def open_packed(directory: Path) -> ModelSource:
    """Return the packed model in `directory` (see `pack_model`); reads its header only."""
    resolve_inside(directory, PACKED_FILE)
    source = _open_file(directory / PACKED_FILE)
    metadata = source.metadata
    if os.path.lexists(directory / GGUF_METADATA_FILE):
        resolve_inside(directory, GGUF_METADATA_FILE)
        metadata = read_json_object(directory / GGUF_METADATA_FILE, max_bytes=_METADATA_BYTES)
    return dataclasses.replace(source, path=directory, metadata=metadata)


def _open_file(path: Path) -> ModelSource:
    file = SafetensorsFile(path)
    manifest = _manifest(file)
    if (version := manifest.get("version")) != PACK_VERSION:
        raise ModelFileError(
            f"{path} was packed in version {quoted(version)}, this bise reads {PACK_VERSION}: pack it again",
            field="version",
        )
    try:
        config = _config_from_json(_object(manifest, "config"))
        formats = _object(manifest, "formats")
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise _not_packed(file, str(error)) from error
    if config.num_layers * max(config.num_experts, 1) > len(file.entries):
        # Refused before any name is built: a damaged count must not cost a dictionary of millions.
        raise ModelFileError(f"{path}: weights do not match its configuration", field="num_layers")
    shapes = weight_shapes(config)
    if set(formats) != set(shapes) or set(file.entries) != set(shapes):
        raise ModelFileError(f"{path}: weights do not match its configuration", field=str(path))
    for tensor, packed_format in formats.items():
        if not isinstance(packed_format, str) or packed_format not in PACKED_FORMATS:
            raise ModelFileError(
                f"{path}: weight {tensor} has the unknown format {quoted(packed_format)}", field=tensor
            )
    name, licence = manifest.get("name"), manifest.get("licence")
    slots, _ = plan_slots({tensor: (shapes[tensor], str(formats[tensor])) for tensor in shapes})
    for slot in slots:
        if file.entries[slot.name].size_bytes != slot.size_bytes:
            raise ModelFileError(f"{path}: weight {slot.name} has the wrong size", field=slot.name)
    return ModelSource(
        path=path,
        kind="packed",
        config=config,
        tensors={slot.name: PackedTensor(file, slot) for slot in slots},
        name=name if isinstance(name, str) else "",
        licence=licence if isinstance(licence, str) else None,
        default_quant="none",
    )


def _manifest(file: SafetensorsFile) -> dict[str, object]:
    """Return what `write_packed` noted in the header: version, config, formats, name, licence."""
    if "bise" not in file.metadata:
        raise _not_packed(file, "its header has no entry 'bise'")
    manifest = parse_json(file.metadata["bise"].encode(), f"{file.path}: bise")
    if not isinstance(manifest, dict):
        raise _not_packed(file, f"bise is {kind_of(manifest)}, not an object")
    return cast(dict[str, object], manifest)


def _object(manifest: Mapping[str, object], key: str) -> dict[str, object]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {kind_of(value)}, not an object", field=key)
    return cast(dict[str, object], value)


def _not_packed(file: SafetensorsFile, reason: str) -> ModelFileError:
    return ModelFileError(f"{file.path} is not a packed model of bise: {reason}", field=str(file.path))


def require_finite(source: ModelSource, slot: Slot, panels: npt.NDArray[np.uint8]) -> None:
    """Raise ModelFileError when a packed vector has a value that is NaN or infinite."""
    if len(slot.shape) == 1 and not np.isfinite(panels.view(np.float32)).all():
        raise ModelFileError(f"{source.path}: weight {slot.name} is not finite; pack the original again")


def require_unpacked(source: ModelSource, quant: str) -> None:
    """Raise ConfigError when `quant` asks a packed source for another width than it has."""
    if source.kind == "packed" and quant not in ("auto", "none"):
        raise ConfigError(f"{source.path} is packed already; leave --quant away", field="quant")


def read_packed(source: ModelSource, progress: Progress | None = None) -> PackedWeights:
    """Read the panels of a packed source into memory."""
    tensors = [cast(PackedTensor, tensor) for tensor in source.tensors.values()]
    slots, size = plan_slots({t.slot.name: (t.shape, t.format) for t in tensors})
    memory = arena(size)
    for tensor, slot in zip(tensors, slots, strict=True):
        entry = tensor.file.entries[slot.name]
        tensor.file.read_into(entry, 0, memory[slot.offset : slot.offset + slot.size_bytes])
        require_finite(source, slot, memory[slot.offset :][: slot.size_bytes])
        if progress is not None:
            progress("reading weights", (slot.offset + slot.size_bytes) / size)
    return PackedWeights(PackPlan(slots, size, ()), memory)


def pack_model(
    source: ModelSource,
    quant: str,
    out: Path | None,
    progress: Progress | None = None,
    rounding: Rounding | None = None,
) -> Path:
    """Pack a source into the directory `out` (or the cache) and return the path of what was written.

    With a `rounding` it must be a directory: the cache holds what any start would make.

    The directory can be given as MODEL afterwards: it holds the weights and what the tokenizer needs.
    """
    ops = CpuOps(default_threads())
    if source.kind == "packed":
        raise ConfigError(f"{source.path} is packed already; give the original model", field="model")
    if out is not None:
        _make_empty(out)
    assert rounding is None or out is not None
    packed = pack_weights(source, quant, ops, progress, rounding)
    if out is None:
        path = cache_path(source, quant, progress)
        _write_or_explain(path, source, packed)
        return path
    if source.kind == "gguf":
        text = json.dumps(dict(_portable(source.metadata)))
        (out / GGUF_METADATA_FILE).write_text(text, encoding="utf-8")
    else:
        for name in (*TOKENIZER_FILES, "README.md", "LICENSE"):
            if os.path.lexists(source.path / name):
                resolve_inside(source.path, name)
                if (source.path / name).is_file():
                    shutil.copyfile(source.path / name, out / name)
    _write_or_explain(out / PACKED_FILE, source, packed)
    return out


def _make_empty(out: Path) -> None:
    """Make the directory `out`; UserError when it holds something or cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty; give a new directory", field="out")
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}", field="out") from error


def load_packed(
    source: ModelSource, quant: str, ops: CpuOps, progress: Progress | None = None
) -> tuple[PackedWeights, tuple[str, ...]]:
    """Return the packed weights of any source: read when packed or cached, else made (and cached when large).

    Also returns the notes for people: conversions that change values, and a cache that could not be written.
    """
    require_unpacked(source, quant)
    if source.kind == "packed":
        return read_packed(source, progress), ()
    stored = sum(tensor.size_bytes for tensor in source.tensors.values())
    if stored < CACHE_MINIMUM_BYTES:
        packed = pack_weights(source, quant, ops, progress)
        return packed, packed.plan.notes
    path = cache_path(source, quant, progress)
    cached = open_cached(path, source)
    if cached is not None:
        try:
            return read_packed(cached, progress), plan_packing(source, quant).notes
        except ModelFileError:
            pass  # damaged: made anew below
    packed = pack_weights(source, quant, ops, progress)
    notes = packed.plan.notes
    try:
        write_packed(path, source, packed)
    except OSError as error:
        notes += (f"the packed weights could not be cached at {path.parent}: {error.strerror}",)
    return packed, notes


def open_cached(path: Path, source: ModelSource) -> ModelSource | None:
    """Return the packed form of `source` at `path`; None where there is none that this version reads."""
    try:
        cached = _open_file(path) if path.exists() else None
    except ModelFileError:
        return None
    return cached if cached is not None and cached.config == source.config else None


def cache_path(source: ModelSource, quant: str, progress: Progress | None = None) -> Path:
    """Return where the packed form of a source is cached: named by the hash of the source's content."""
    return (
        bise_home()
        / "cache"
        / "packed"
        / f"{content_hash(source, progress)[:40]}-{quant}-v{PACK_VERSION}.safetensors"
    )


def content_hash(source: ModelSource, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a model's weight files (hex).

    Reading 14 GB takes seconds, so the result is remembered by path, size, time of change and inode.
    """
    files = list(_weight_files(source))
    identity = json.dumps(
        [[str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ino] for p in files for s in [p.stat()]]
    )
    memo = bise_home() / "cache" / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        known = memo.read_text(encoding="ascii").strip()
        if len(known) == 64:
            return known
    except OSError:
        pass
    digest = hashlib.sha256()
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        descriptor, size = open_regular(path)
        try:
            for offset in range(0, size, HASH_BYTES):
                digest.update(read_at(descriptor, path, offset, min(HASH_BYTES, size - offset)))
                done += min(HASH_BYTES, size - offset)
                if progress is not None:
                    progress("hashing the files", done / max(total, 1))
        finally:
            os.close(descriptor)
    found = digest.hexdigest()
    try:
        state_directory("cache", "hashes")
        temporary = draft_of(memo)
        temporary.write_text(found, encoding="ascii")
        temporary.replace(memo)
    except OSError:
        pass  # a memory aid only: without it the next start hashes again
    return found


def _weight_files(source: ModelSource) -> Iterator[Path]:
    path = source.path
    if not path.is_file():
        yield from sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf"))
        return
    stem, is_split, rest = path.name.rpartition("-00001-of-")
    if not is_split:
        yield path
        return
    begin, end = f"{stem}-", f"-of-{rest}"
    yield from sorted(p for p in path.parent.iterdir() if p.name.startswith(begin) and p.name.endswith(end))


def _write_or_explain(path: Path, source: ModelSource, packed: PackedWeights) -> None:
    try:
        write_packed(path, source, packed)
    except OSError as error:
        raise BiseError(f"{path} could not be written: {error.strerror}", field=str(path)) from error


def _portable(metadata: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield GGUF metadata as JSON values: arrays as lists."""
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            yield key, value.tolist()
        elif isinstance(value, (str, int, float, bool)):
            yield key, value
        elif isinstance(value, bytes):
            continue
        else:
            yield key, list(cast(list[object], value))


def _config_from_json(values: dict[str, object]) -> ModelConfig:
    fields = {item.name for item in dataclasses.fields(ModelConfig)}
    if unknown := set(values) - fields:
        raise ConfigError(f"unknown configuration field {sorted(unknown)[0]}")
    if not isinstance(values.get("family"), str) or not isinstance(values.get("tied_embeddings"), bool):
        raise ConfigError("family must be a string and tied_embeddings true or false")
    scaling = values.get("rope_scaling")
    prepared = dict(values)
    if scaling is not None:
        stretched = dict(cast(dict[str, object], scaling))
        for key, value in stretched.items():
            if isinstance(value, list):
                stretched[key] = tuple(cast(list[float], value))
        prepared["rope_scaling"] = RopeScaling(**stretched)  # pyright: ignore[reportArgumentType]
    prepared["windows"] = tuple(cast(list[int | None], values["windows"]))
    return ModelConfig(**prepared)  # pyright: ignore[reportArgumentType]
