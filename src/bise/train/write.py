"""Publishing a whole model: written beside its place, brought to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bise.errors import ConfigError, StoreError
from bise.train.gguf_writer import FORMS, write_gguf
from bise.train.safetensors_writer import require_layout, write_model
from bise.train.whole import WholeModel

FORMATS = ("safetensors", *(f"gguf-{form}" for form in FORMS))
"""What `export_model` can write."""


def export_model(model: WholeModel, out: Path, form: str) -> list[str]:
    """Write a model as `form` of `FORMATS`: a directory, or one .gguf file; return remarks for the user.

    `out` is there whole or not at all. Raises ConfigError when it exists or the model cannot be written so,
    StoreError when the disk does not take it.
    """
    require_free(out)
    if form == "safetensors":
        require_layout(model.source)
    elif out.suffix != ".gguf":
        raise ConfigError(f"--out {out}: a GGUF file's name ends in .gguf", field="out")
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)
    remarks: list[str] = []
    try:
        if form == "safetensors":
            partial.mkdir()
            write_model(partial, model.source, model.values)
        else:
            remarks = write_gguf(partial, model, FORMS[form.removeprefix("gguf-")])
        publish(partial, out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(partial)
    return remarks


def require_free(out: Path) -> None:
    """Raise ConfigError unless `out` can be made: it is not there, and its parent is a directory."""
    if out.exists():
        raise ConfigError(f"{out} exists; name another --out or remove it", field="out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.parent} is no directory; make it or name another --out", field="out")


def publish(partial: Path, path: Path) -> None:
    """Give a finished file or directory its name, after everything in it has reached the disk."""
    for file in sorted(partial.rglob("*"), reverse=True) if partial.is_dir() else ():  # directories last
        _sync(file)
    _sync(partial)
    partial.rename(path)
    _sync(path.absolute().parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
