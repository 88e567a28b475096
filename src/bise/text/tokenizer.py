"""Text to token ids and back, behind one interface for every vocabulary format.

Owns the `Tokenizer` contract and the choice of a reader for what lies on disk. Knows nothing of chat formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bise.errors import ModelFileError


class Tokenizer(Protocol):
    """A vocabulary. `encode` never produces a control token, whatever the text says."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Begin-of-sequence id, None when the model uses none."""
        ...

    @property
    def adds_bos(self) -> bool:
        """True when plain text is prefixed with `bos_id` (the source's own rule)."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: end-of-sequence, end-of-turn."""
        ...

    @property
    def space_prefix(self) -> bool:
        """True when a text starts with a space that is not shown (the SentencePiece dummy prefix)."""
        ...

    @property
    def controls(self) -> Mapping[str, int]:
        """Every string that stands for a control token, with its id; `encode` never yields these ids."""
        ...

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Return the ids of `text` alone: no BOS, control strings inside the text stay text.

        `start=False`: the text follows other pieces of the same sequence, for vocabularies that put the dummy
        prefix only before the very first one; all others ignore it.
        """
        ...

    def split_controls(self, text: str) -> list[str | int]:
        """Return `text` cut at its control strings, each replaced by its id; leftmost longest match.

        For text that a trusted template wrote. `"<s>[INST] hi"` gives `[1, 3, " hi"]`.
        """
        ...

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token such as `[INST]`, None when the vocabulary has none of that
        name.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token adds inside a text; empty for control tokens and for ids without a
        piece.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; invalid UTF-8 becomes U+FFFD, control tokens are left out."""
        ...


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read the tokenizer of a model directory; every id is below `vocab_size`, the model's embedding rows.

    Mistral's own files win (`tekken.json`, then `tokenizer.model.v1` and later), because they carry the
    version of the chat format; then Hugging Face's `tokenizer.json`; then a bare SentencePiece
    `tokenizer.model`. Raises ModelFileError naming file and field when nothing fits or a file is
    malformed.
    """
    from bise.text.mistral_tokenizer import find_mistral_file, load_mistral_tokenizer

    if mistral := find_mistral_file(path):
        return load_mistral_tokenizer(mistral, vocab_size)
    if (path / "tokenizer.json").exists() or (path / "tokenizer.json").is_symlink():
        from bise.text.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(path, vocab_size)
    if mistral := find_mistral_file(path, unversioned=True):
        return load_mistral_tokenizer(mistral, vocab_size)
    raise ModelFileError(
        f"{path}: has no tokenizer; known: tokenizer.json, tekken.json, tokenizer.model, tokenizer.model.v3",
        field="tokenizer",
    )


def tokenizer_from_gguf(metadata: Mapping[str, object], vocab_size: int) -> Tokenizer:
    """Build the tokenizer that a GGUF file carries in its key/value pairs; every id is below `vocab_size`.

    Raises ModelFileError naming the key when one is missing, malformed or unsupported.
    """
    from bise.text.gguf_tokenizer import load_gguf_tokenizer

    return load_gguf_tokenizer(metadata, vocab_size)
