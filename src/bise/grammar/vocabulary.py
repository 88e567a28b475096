"""A model's tokens as the mask engine sees them, and the fewest tokens that spell a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bise.errors import RequestError
from bise.grammar.tracker import Piece
from bise.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_MARK = b"\xff"
"""Begins the name of a token that no text spells, in the mask engine's own way."""


class Vocabulary:
    """The tokens of one model. Making one takes up to a second for 131,072 tokens; keep it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Take the pieces of `tokenizer`; `vocab_size` is the width of the model's logits."""
        self.tokenizer = tokenizer
        self.size = vocab_size
        self.pieces = tuple(tokenizer.token_bytes(token_id) for token_id in range(vocab_size))
        self._ids: dict[bytes, int] = {}
        for token_id, piece in enumerate(self.pieces):
            if piece:
                self._ids.setdefault(piece, token_id)
        self.longest = max(map(len, self._ids), default=0)
        self.spells_every_byte = all(bytes([byte]) in self._ids for byte in range(256))
        self.engine = self._engine()
        self._others: dict[int, npt.NDArray[np.intp]] = {}

    def all_but(self, token_id: int) -> npt.NDArray[np.intp]:
        """Return every token but one, ascending: the same read-only array each time, because to make it takes
        a millisecond for 131,072 tokens.
        """
        others = self._others.get(token_id)
        if others is None:
            others = np.delete(np.arange(self.size, dtype=np.intp), token_id)
            others.setflags(write=False)
            self._others[token_id] = others
        return others

    def _engine(self) -> LLTokenizer:
        import llguidance

        names = [piece or _MARK + f"[{token_id}]".encode() for token_id, piece in enumerate(self.pieces)]
        # The engine wants one end-of-text token; which of the model's own may end a text is decided here, so
        # it gets one that the model does not have.
        names.append(_MARK + b"[end]")
        source = _Pieces(names, [n for n, piece in enumerate(self.pieces) if not piece] + [self.size])
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(source), n_vocab=self.size + 1)

    def spell(self, pieces: Sequence[Piece]) -> list[int] | None:
        """Return the fewest tokens that spell `pieces`; None when the vocabulary cannot."""
        ids: list[int] = []
        for part in _joined(pieces):
            if isinstance(part, int):
                ids.append(part)
                continue
            spelled = self._spell_text(part)
            if spelled is None:
                return None
            ids += spelled
        return ids

    def count_greedily(self, pieces: Sequence[Piece]) -> int | None:
        """Return how many tokens spell `pieces` when each is the longest that fits; at least `spell`'s
        count.
        """
        count = 0
        for part in _joined(pieces):
            if isinstance(part, int):
                count += 1
                continue
            place = 0
            while place < len(part):
                step = next(
                    (n for n in range(self.longest, 0, -1) if part[place : place + n] in self._ids), None
                )
                if step is None:
                    return None
                place += step
                count += 1
        return count

    def _spell_text(self, text: bytes) -> list[int] | None:
        """Return the fewest tokens of `text`, longer ones first among equals, in time linear in it."""
        best: list[tuple[int, int] | None] = [None] * len(text) + [(0, 0)]
        for place in range(len(text) - 1, -1, -1):
            for length in range(min(self.longest, len(text) - place), 0, -1):
                rest = best[place + length]
                if rest is None or text[place : place + length] not in self._ids:
                    continue
                found = best[place]
                if found is None or rest[0] + 1 < found[0]:
                    best[place] = (rest[0] + 1, length)
        ids: list[int] = []
        place = 0
        while place < len(text):
            found = best[place]
            if found is None:
                return None
            ids.append(self._ids[text[place : place + found[1]]])
            place += found[1]
        return ids

    def control(self, name: str, field: str) -> int:
        """Return the id of a control token; RequestError when the vocabulary has none of that name."""
        token_id = self.tokenizer.control_id(name)
        if token_id is None:
            raise RequestError(f"{field} needs the control token {name}; the model has none", field=field)
        return token_id


class _Pieces:
    """What the mask engine asks of a tokenizer."""

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.bos_token_id = None
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: bytes | str) -> list[int]:
        """Spell a text: never asked for, because the grammars force no spelling."""
        del text
        return []


def _joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield `pieces` with neighbouring texts made one."""
    text = b""
    for piece in pieces:
        if isinstance(piece, int):
            if text:
                yield text
            text = b""
            yield piece
        else:
            text += piece
    if text:
        yield text
