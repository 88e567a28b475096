"""Checkpoints that are there whole or not at all: temp directory, fsync, rename, fsync of the folder.

A directory named `step-N` is complete, whenever the process or the machine died.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bise.errors import ModelFileError, StoreError
from bise.jsonfile import read_json_object
from bise.train.layout import step_name
from bise.train.safetensors_writer import write_tensors
from bise.train.write import publish

KEPT = 2
"""Checkpoints to resume from that stay; older ones are removed once a newer one is there."""
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial-"
_STATE = "state.safetensors"


class Checkpoint:
    """A checkpoint on disk, read piece by piece."""

    def __init__(self, path: Path) -> None:
        """Open it; ModelFileError when it cannot be read."""
        self.path = path
        try:
            # safetensors has no annotations
            self._file: Any = safe_open(path / _STATE, framework="pt")  # pyright: ignore[reportUnknownVariableType]
            self.names = frozenset(cast("list[str]", self._file.keys()))
        except (OSError, SafetensorError) as error:
            raise ModelFileError(
                f"{path} cannot be read: {error}; remove it to use the one before"
            ) from error
        self.progress = read_json_object(path / "progress.json")

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Return rows [start, end) of a tensor."""
        return cast(Tensor, self._file.get_slice(name)[start:end])

    def whole(self, name: str) -> Tensor:
        """Return a tensor."""
        return cast(Tensor, self._file.get_tensor(name))


def save_checkpoint(
    run: Path,
    step: int,
    shapes: Mapping[str, Sequence[int]],
    values: Iterable[Tensor],
    progress: Mapping[str, object],
    *,
    kept: int = KEPT,
) -> Path:
    """Write a checkpoint of float32 tensors and return its directory; what was there before stays until it is
    complete, then the newest `kept` of all. `values` are asked for one at a time, in the order of `shapes`.

    Raises StoreError when the disk does not take it; nothing of it is left then.
    """
    path = run / step_name(step)
    partial = run / f"{_PARTIAL}{path.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(
            partial / _STATE,
            [(name, "F32", shape) for name, shape in shapes.items()],
            (tensor.detach().numpy() for tensor in values),  # pyright: ignore[reportUnknownMemberType]
        )
        (partial / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        publish(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StoreError(
            f"the checkpoint of step {step} cannot be written to {run}: {error.strerror or error}; make room "
            "and use --resume: the one before is good"
        ) from error
    for old in checkpoints(run)[:-kept]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_latest(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint; None when there is none."""
    found = checkpoints(run)
    return Checkpoint(found[-1]) if found else None


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if _NAME.fullmatch(path.name))


def number(progress: Mapping[str, object], name: str) -> float:
    """Return a number of a checkpoint's progress."""
    return float(cast(float, progress[name]))
