"""Models on this machine that can be taken away or checked again."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from bise.errors import UserError
from bise.hub.checksums import CHECKSUMS, damaged_in
from bise.hub.client import Progress
from bise.hub.embedded import NAME as EMBEDDED
from bise.hub.embedded import damaged_files
from bise.hub.file_names import is_local_name
from bise.hub.pull import STAGING, no_progress
from bise.hub.registry import local_models, models_dir, origin_of


def find_installed(name: str) -> Path:
    """Return the folder or file under `models_dir()` that a name or repository means; UserError for none."""
    for path in local_models():
        if name in (
            path.name,
            path.stem if path.suffix == ".gguf" else path.name,
            origin_of(path).get("repo"),
        ):
            return path
    raise UserError(f"there is no model '{name}' under {models_dir()}; `bise models` lists them")


def remove(name: str) -> Path | None:
    """Take a model away, with what a stopped pull left of it; return where it was, None when only the latter
    was there. Its name is gone at once, its files follow. UserError when there is nothing.
    """
    if name == EMBEDDED:
        raise UserError("the embedded model is part of bise and cannot be removed")
    staging = models_dir() / STAGING
    left = [staging / entry for entry in (name, f"{name}.done")] if is_local_name(name) else []
    found = [path for path in left if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    try:
        target = find_installed(name)
    except UserError:
        if found:
            return None
        raise
    if target.is_symlink() or target.is_file():
        target.unlink()
        return target
    staging.mkdir(mode=0o700, exist_ok=True)
    grave = staging / f"removed-{uuid.uuid4().hex}"
    target.rename(grave)
    shutil.rmtree(grave)
    return target


def verify(name: str, progress: Progress = no_progress) -> list[str]:
    """Return the files of a model that are not as they were pulled or shipped: [] when all are. UserError for
    a model without a list of hashes.
    """
    if name == EMBEDDED:
        return damaged_files()
    path = find_installed(name)
    if not (path / CHECKSUMS).exists() and not origin_of(path):
        raise UserError(f"{path} was not pulled, so nothing is known to compare it with")
    return damaged_in(path, progress)
