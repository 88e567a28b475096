"""Text of a growing sequence: never half a character, never a part of a stop string.

Owns what is held back and when the text ends. Knows nothing of engines.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from bise.errors import RequestError
from bise.text.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text that is safe to show, in time linear in the text.

    The text shown in all equals `tokenizer.decode` of all ids, cut before the stop string that starts
    first. A match is decided when no stop string that started earlier can still complete; until then its
    text is held back.

    Worked example, stop = ("###",): push(a) "Hi #" shows "Hi " and holds "#"; push(b) "1 ##" shows "#1 "
    and holds "##"; push(c) "# x" shows "" and ends with `stopped == "###"`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continuation: bool = False) -> None:
        """Start a text.

        `continuation`: the ids go on after a text that is already shown, so that a leading space is real;
        else the dummy prefix of SentencePiece vocabularies is left out. Raises RequestError for an empty
        stop string.
        """
        for index, string in enumerate(stop):
            if not string:
                raise RequestError(f"stop[{index}] must not be empty", field="stop")
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.space_prefix and not continuation
        self._matchers = [_Matcher(string) for string in dict.fromkeys(stop)]
        self._held = ""
        self._shown = 0
        """Characters shown so far; `_held` starts there."""
        self._match: tuple[int, str] | None = None
        """Earliest complete stop string: (start in characters, string)."""
        self._stopped: str | None = None
        self._ended = False

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text that became safe to show; nothing once a stop string ended the
        text.
        """
        if self._ended:
            return ""
        data = b"".join(map(self._tokenizer.token_bytes, token_ids))
        if self._drops_space and data:
            self._drops_space = False
            data = data.removeprefix(b" ")
        return self._add(self._decoder.decode(data))

    def release(self) -> str:
        """Look for no stop string from here on, because what follows is no plain text; return what was held
        back, up to a stop string that is complete.
        """
        if self._ended:
            return ""
        # A character that the plain text left unfinished must not swallow what follows.
        shown = self._add(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        if self._ended:
            return shown
        if self._match:
            self._ended = True
            return shown + self._stop()
        self._matchers = []
        return shown + self._show(self._shown + len(self._held))

    def finish(self) -> str:
        """End the text and return what was held back; an incomplete character becomes U+FFFD."""
        if self._ended:
            return ""
        shown = self._add(self._decoder.decode(b"", final=True))
        if not self._ended:
            self._ended = True
            if self._match:
                shown += self._stop()
            else:
                shown += self._held
                self._held = ""
        return shown

    def _add(self, text: str) -> str:
        if not self._matchers:
            return text
        base = self._shown + len(self._held)
        self._held += text
        for position, char in enumerate(text, start=base + 1):
            for matcher in self._matchers:
                if matcher.advance(char):
                    start = position - len(matcher.string)
                    if self._match is None or start < self._match[0]:
                        self._match = (start, matcher.string)
            if self._match and all(position - m.matched >= self._match[0] for m in self._matchers):
                self._ended = True
                return self._stop()
        end = base + len(text)
        pending = min(end - matcher.matched for matcher in self._matchers)
        if self._match:
            pending = min(pending, self._match[0])
        return self._show(pending)

    def _show(self, until: int) -> str:
        count = until - self._shown
        text, self._held = self._held[:count], self._held[count:]
        self._shown = until
        return text

    def _stop(self) -> str:
        assert self._match is not None
        start, self._stopped = self._match
        text = self._show(start)
        self._held = ""
        return text


class _Matcher:
    """Knuth-Morris-Pratt search for one string over a stream of characters."""

    __slots__ = ("_fallback", "matched", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        """Length of the longest proper prefix of the string that ends the text so far."""
        self._fallback = [0] * (len(string) + 1)
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length]
            length += string[index] == string[length]
            self._fallback[index + 1] = length

    def advance(self, char: str) -> bool:
        """Take one character; True when the string is complete with it."""
        while self.matched and self.string[self.matched] != char:
            self.matched = self._fallback[self.matched]
        self.matched += self.string[self.matched] == char
        if self.matched < len(self.string):
            return False
        self.matched = self._fallback[self.matched]
        return True
