"""An answer as blocks of one kind each (thoughts, text, calls), for the forms that stream it so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bise.server.reading import Piece


class Kind(Enum):
    """What a block holds."""

    THOUGHT = "thought"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """One block; grows while it is open."""

    kind: Kind
    index: int
    text: str = ""
    """Of a call: its arguments."""
    call: dict[str, Any] | None = None


class Change(Enum):
    """What happened to a block."""

    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


class Blocks:
    """Cuts pieces into blocks as they come."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def add(self, pieces: Iterable[Piece]) -> Iterator[tuple[Change, Block, str]]:
        """Yield what each piece changes: (change, block, new text)."""
        for piece in pieces:
            if piece.thought:
                yield from self._grow(Kind.THOUGHT, piece.thought)
            if piece.text:
                yield from self._grow(Kind.TEXT, piece.text)
            for call in piece.calls:
                yield from self.end()
                block = Block(Kind.CALL, len(self.all), call["function"]["arguments"], call)
                self.all.append(block)
                yield Change.OPENED, block, ""
                yield Change.GREW, block, block.text
                yield Change.CLOSED, block, ""

    def end(self) -> Iterator[tuple[Change, Block, str]]:
        """Close the block that is open."""
        block, self._open = self._open, None
        if block is not None:
            yield Change.CLOSED, block, ""

    def _grow(self, kind: Kind, text: str) -> Iterator[tuple[Change, Block, str]]:
        if self._open is None or self._open.kind is not kind:
            yield from self.end()
            self._open = Block(kind, len(self.all))
            self.all.append(self._open)
            yield Change.OPENED, self._open, ""
        self._open.text += text
        yield Change.GREW, self._open, text
