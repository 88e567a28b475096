"""Mistral's own tokenizer files: Tekken JSON and versioned SentencePiece models.

Owns which file of a directory counts and which chat version it names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bise.errors import ModelFileError
from bise.text.pieces import PieceTokenizer

_VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralFile:
    """A Mistral tokenizer file of a model directory."""

    path: Path
    kind: str
    """`tekken` or `spm`."""


def find_mistral_file(path: Path, *, unversioned: bool = False) -> MistralFile | None:
    """Return the file that names a chat version: `tekken.json`, then the highest `tokenizer.model.vN`.

    `unversioned` looks for a bare `tokenizer.model` instead, which says nothing about chat formats.
    """
    if unversioned:
        bare = path / "tokenizer.model"
        return MistralFile(path=bare, kind="spm") if bare.exists() else None
    if (path / "tekken.json").exists():
        return MistralFile(path=path / "tekken.json", kind="tekken")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    versioned = [(int(match[1]), name) for name in names if (match := _VERSIONED.fullmatch(name))]
    return MistralFile(path=path / max(versioned)[1], kind="spm") if versioned else None


def load_mistral_tokenizer(file: Path, vocab_size: int) -> PieceTokenizer:
    """Read a Tekken or SentencePiece file."""
    raise ModelFileError(f"{file}: Mistral's own tokenizer files are not read yet", field="tokenizer")
