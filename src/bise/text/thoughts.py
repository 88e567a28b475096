"""Thoughts of a model that thinks first, told from its answer by the control tokens around them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from bise.text.tokenizer import Tokenizer

OPEN, CLOSE = "[THINK]", "[/THINK]"


class Thoughts:
    """Reads one sequence.

    The text of a sequence comes in order, only later than its tokens: so it is enough to know how many
    characters the thoughts have.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open = tokenizer.control_id(OPEN)
        self._close = tokenizer.control_id(CLOSE)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = False
        self.num_tokens = 0
        """Tokens of thoughts so far."""
        self._thought_chars = 0
        self._shown = 0

    @property
    def can_come(self) -> bool:
        """True when the model's vocabulary has the control tokens."""
        return self._open is not None and self._close is not None

    def cut(self, token_ids: Sequence[int], text: str) -> tuple[str, str]:
        """Return (thought, answer) of `text`, what new tokens `token_ids` made safe to show."""
        for token_id in token_ids:
            if token_id == self._open:
                self._inside = True
            elif token_id == self._close:
                self._inside = False
            elif self._inside:
                self.num_tokens += 1
                self._thought_chars += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        count = len(text) if self._inside else max(0, self._thought_chars - self._shown)
        self._shown += len(text)
        return text[:count], text[count:]
