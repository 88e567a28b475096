"""Vocabularies that GGUF files carry in their key/value pairs."""

from __future__ import annotations

from collections.abc import Mapping

from bise.errors import ModelFileError
from bise.text.pieces import PieceTokenizer


def load_gguf_tokenizer(metadata: Mapping[str, object], vocab_size: int) -> PieceTokenizer:
    """Build the tokenizer of a GGUF file's metadata."""
    raise ModelFileError("the vocabulary of a GGUF file is not read yet", field="tokenizer.ggml.model")
