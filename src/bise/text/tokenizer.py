"""Text to token ids and back, behind one interface for every vocabulary format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone: no BOS, control strings inside the text stay text."""
        ...

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token such as `[INST]`, None when the vocabulary has none of that name."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token adds inside a text; empty for control tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; invalid UTF-8 becomes U+FFFD, control tokens are left out."""
        ...
