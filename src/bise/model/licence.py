"""The licence and the name of a model directory, for people; nothing here decides anything."""

from __future__ import annotations

import re
from pathlib import Path

from bise.diskfile import read_prefix, resolve_inside

_MAX_BYTES = 1 << 16
_LINE = re.compile(r"license(?P<kind>_name)?:\s*(?P<value>.*)")


def licence_of(directory: Path, names: frozenset[str]) -> str | None:
    """Return the licence of a model directory: README.md's front matter, else what LICENSE says.

    `names` are the directory's entries. Reads at most 64 KiB of each file.
    """
    for readme in ("README.md", "readme.md"):
        if readme in names and (licence := _front_matter(_text(directory, readme))):
            return licence
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING"):
        if name in names:
            return _recognised(_text(directory, name))
    return None


def model_name(directory: Path) -> str:
    """Return a name for people: `owner/name` inside a hub cache, else the directory's own name."""
    folder = directory.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _text(directory: Path, name: str) -> str:
    return read_prefix(resolve_inside(directory, name), _MAX_BYTES).decode("utf-8", "replace")


def _front_matter(text: str) -> str | None:
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    found: dict[str, str] = {}
    for index, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            break
        if match := _LINE.fullmatch(line.rstrip()):
            value = match["value"].strip().strip("\"'[]")
            if not value and index + 1 < len(lines) and lines[index + 1].strip().startswith("- "):
                value = lines[index + 1].strip()[2:].strip("\"' ")
            found[match["kind"] or ""] = _shown(value)
    if found.get("") in (None, "", "other"):
        return found.get("_name") or found.get("") or None
    return found[""]


def _recognised(text: str) -> str | None:
    if "Apache License" in text and "Version 2.0" in text:
        return "apache-2.0"
    if "MIT License" in text or "Permission is hereby granted, free of charge" in text:
        return "mit"
    first = next((line.strip(" #*") for line in text.splitlines() if line.strip(" #*")), None)
    return _shown(first) if first else None


def _shown(value: str) -> str:
    return "".join(char for char in value if char.isprintable())[:80]
