"""The tokenizer that every format is turned into: bytes per id, control strings, and a function that
encodes text.

Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bise.errors import RequestError
from bise.text.controls import ControlSplitter, ControlString

SPACE_MARK = "\u2581"
"""SentencePiece's visible stand-in for a space."""

BRACKETED = re.compile(r"<\S+>|\[\S+\]")
"""Tokens that look like markup are never made from text, even when their file calls them ordinary."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceTokenizer:
    """A `Tokenizer` over a table of pieces; see there for what each method promises."""

    pieces: Sequence[bytes]
    """Bytes of each id inside a text; empty for control tokens and holes."""
    control_strings: tuple[ControlString, ...]
    bos_id: int | None
    adds_bos: bool
    stop_ids: frozenset[int]
    space_prefix: bool
    encoder: Callable[[str, bool], list[int]]
    """Ids of (text, is it the start of a sequence); never a control token."""
    chat_format: str | None = None
    """The chat format that the source names, such as `v3` or `v7-tekken`; None when it names none."""
    model_settings: str = ""
    """JSON text of the model settings that chat prompts carry by default (v15); "" for none."""
    controls: Mapping[str, int] = field(init=False)
    _splitter: ControlSplitter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "controls", {item.text: item.token_id for item in self.control_strings})
        object.__setattr__(self, "_splitter", ControlSplitter(self.control_strings))

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self.pieces)

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Return the ids of `text`; RequestError when it is not valid Unicode."""
        if not text:
            return []
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the text has half of a surrogate pair at character {error.start}; send valid Unicode"
                ) from error
        return self.encoder(text, start)

    def split_controls(self, text: str) -> list[str | int]:
        """Return `text` cut at its control strings, each replaced by its id."""
        return self._splitter.split(text)

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token by its string, or None."""
        return self.controls.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token adds inside a text."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self.pieces[token_id] if token_id < len(self.pieces) else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, without the dummy prefix."""
        joined = b"".join(map(self.token_bytes, token_ids))
        if self.space_prefix and joined.startswith(b" "):
            joined = joined[1:]
        return joined.decode("utf-8", errors="replace")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the printable character that stands for each of the 256 bytes.

    Printable Latin-1 bytes stand for themselves; the 68 others, in order, are U+0100, U+0101, ...: byte
    0x20 is U+0120.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def byte_level_bytes(piece: str, alphabet: Mapping[str, int]) -> bytes:
    """Return the bytes of a byte-level piece; one with characters outside the alphabet is literal text."""
    values = [alphabet.get(char) for char in piece]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else piece.encode("utf-8", errors="replace")


def sentencepiece_bytes(piece: str, *, byte_fallback: bool) -> bytes:
    """Return the bytes of a SentencePiece piece: `<0x0A>` is one byte, U+2581 a space."""
    if byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8", errors="replace")
