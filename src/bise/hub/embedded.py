"""The model that ships inside the package: where its files lie, and whether they are whole.

Knows files and hashes only; what is in them is the business of `bise.model`.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from bise.errors import ModelFileError

NAME = "brise"
CHECKSUMS = "SHA256SUMS"
"""One `hash  name` line per shipped file, written by the export."""


def embedded_path() -> Path:
    """Return the directory of the embedded model; ModelFileError when this installation has none."""
    path = Path(str(resources.files("bise.hub"))) / NAME
    if not (path / "config.json").is_file():
        raise ModelFileError(
            f"this installation has no embedded model (expected in {path}); reinstall bise or name a model"
        )
    return path


def is_embedded(path: Path) -> bool:
    """Return True for the embedded model's own directory."""
    return path.name == NAME and path.parent == Path(str(resources.files("bise.hub")))


def damaged_files() -> list[str]:
    """Return the names of shipped files that are missing or differ from their recorded hash."""
    path = embedded_path()
    listing = path / CHECKSUMS
    if not listing.is_file():
        return [CHECKSUMS]
    damaged: list[str] = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            damaged.append(name)
    return damaged


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
