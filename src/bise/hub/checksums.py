"""The list of SHA-256 sums beside a model's files, and the search for files that differ from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
"""One `hash  name` line per file."""

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\x00-\x1f]+)")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing_of(sums: Mapping[str, str]) -> str:
    """Return the text of a list: `sums` are hashes by file name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def damaged_in(folder: Path, progress: Callable[[str, float], None] | None = None) -> list[str]:
    """Return the names of files that are missing, differ from their recorded hash, or are in no list.

    The list itself is named when it is missing or not as it was written.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [CHECKSUMS]
    matches = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    sums = {match[2]: match[1] for match in matches if match}
    if None in matches or len(sums) != len(matches) or not text.endswith("\n"):
        return [CHECKSUMS]
    damaged: list[str] = []
    for done, (name, expected) in enumerate(sums.items()):
        if progress is not None:
            progress(name, done / len(sums))
        file = folder / name
        if not file.is_file() or sha256_of(file) != expected:
            damaged.append(name)
    present = {entry.name for entry in folder.iterdir()} - {CHECKSUMS}
    return [*damaged, *sorted(present - sums.keys())]
