"""Questions that the empty screen offers, as the operator wrote them; without any the page has its own."""

from __future__ import annotations

from collections.abc import Sequence

from bise.errors import ConfigError

MAX_EXAMPLES = 4
MAX_LENGTH = 200


def checked_examples(texts: Sequence[str]) -> tuple[str, ...]:
    """Return example questions with single spaces. Raises ConfigError for too many or a bad one."""
    if len(texts) > MAX_EXAMPLES:
        raise ConfigError(f"example: {MAX_EXAMPLES} questions at most, got {len(texts)}", field="example")
    for text in texts:
        if not text.isprintable() or not 0 < len(text.strip()) <= MAX_LENGTH:
            raise ConfigError(
                f"example must be one line of 1 to {MAX_LENGTH} characters, got {text[:40]!r}",
                field="example",
            )
    return tuple(" ".join(text.split()) for text in texts)
