"""The model that ships inside the package: where its files lie, and whether they are whole.

Knows files and hashes only; what is in them is the business of `bise.model`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from bise.errors import ModelFileError
from bise.hub.checksums import damaged_in

NAME = "brise"


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
    return damaged_in(embedded_path())
