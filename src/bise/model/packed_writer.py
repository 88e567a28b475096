"""Writing packed models: piece by piece, under their final name only when complete."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from bise.diskfile import draft_of
from bise.kernels.cpu import Bytes
from bise.model.pack import PackedWeights, Slot
from bise.model.source import ModelSource

PACK_VERSION = 2
"""Raised when the panel layout changes: files of another version are refused (model) or made anew (cache)."""


def write_packed(path: Path, source: ModelSource, packed: PackedWeights) -> None:
    """Write a packed model to `path`, atomically (see `PackedWriter`)."""
    with PackedWriter(path, source, packed.plan.slots) as writer:
        for slot in packed.plan.slots:
            writer.write(packed.memory[slot.offset : slot.offset + slot.size_bytes])
        writer.commit()


class PackedWriter:
    """A packed model on its way to `path`, where it appears with `commit`; without one nothing stays.

    Temporary file beside it, flush, rename, flush of the directory. Methods raise OSError.
    """

    def __init__(self, path: Path, source: ModelSource, slots: Sequence[Slot]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._temporary = draft_of(path)
        self._file = self._temporary.open("xb")
        header = _header(source, slots)
        try:
            self._file.write(len(header).to_bytes(8, "little") + header)
        except OSError:
            self.close()
            raise

    def write(self, panels: Bytes) -> None:
        """Append the panels of the next slot."""
        self._file.write(panels.data)

    def commit(self) -> None:
        """Make the file appear, all slots being written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Remove what was not committed."""
        with suppress(OSError):  # closing flushes, which fails where writing did
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _header(source: ModelSource, slots: Sequence[Slot]) -> bytes:
    manifest = {
        "version": PACK_VERSION,
        "config": dataclasses.asdict(source.config),
        "formats": {slot.name: slot.packed_format for slot in slots},
        "name": source.name,
        "licence": source.licence,
    }
    header: dict[str, object] = {"__metadata__": {"bise": json.dumps(manifest)}}
    offset = 0
    for slot in slots:
        header[slot.name] = {
            "dtype": "U8",
            "shape": [slot.size_bytes],
            "data_offsets": [offset, offset + slot.size_bytes],
        }
        offset += slot.size_bytes
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
