"""Checkpoints that are there whole or not at all: temp directory, fsync, rename, fsync of the folder.

A directory named `step-N` is complete, whenever the process or the machine died.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from bise.errors import ModelFileError, StoreError
from bise.jsonfile import read_json_object
from bise.train.write import publish

KEPT = 2
"""Checkpoints that stay; older ones are removed once a newer one is there."""
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial-"


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, object]
) -> Path:
    """Write a checkpoint and return its directory; what was there before stays until it is complete.

    Raises StoreError when the disk does not take it; nothing of it is left then.
    """
    path = run / f"step-{step:08d}"
    if path.exists():
        return path
    partial = run / f"{_PARTIAL}{path.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            partial / "state.safetensors",
        )
        (partial / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        publish(partial, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise StoreError(
            f"the checkpoint of step {step} cannot be written to {run}: {reason}; make room and use "
            "--resume: the one before is good"
        ) from error
    for old in _checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_latest(run: Path) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """Return tensors and progress of the newest checkpoint; None when there is none."""
    found = _checkpoints(run)
    if not found:
        return None
    try:
        tensors = load_file(found[-1] / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"{found[-1]} cannot be read: {error}; remove it to use the one before"
        ) from error
    return tensors, read_json_object(found[-1] / "progress.json")


def _checkpoints(run: Path) -> list[Path]:
    if not run.is_dir():
        return []
    return sorted(path for path in run.iterdir() if _NAME.fullmatch(path.name))


def number(progress: Mapping[str, object], name: str) -> float:
    """Return a number of a checkpoint's progress."""
    return float(cast(float, progress[name]))
