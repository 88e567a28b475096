"""Log-probs as both clients read them: token, bytes, id and rivals of every position."""

from __future__ import annotations

from collections.abc import Iterable

from bise.engine.request import TokenLogprob
from bise.text.tokenizer import Tokenizer

FLOOR = -9999.0
"""Log-prob of what is impossible: JSON has no infinity."""


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text; a control token's name; U+FFFD for bytes that are no character alone."""
    piece = tokenizer.token_bytes(token_id)
    if piece:
        return piece.decode("utf-8", "replace")
    return next((name for name, known in tokenizer.controls.items() if known == token_id), "")


def plain_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's name for OpenAI's older form, where names are keys, so that bytes keep theirs."""
    piece = tokenizer.token_bytes(token_id)
    try:
        return piece.decode() or token_name(tokenizer, token_id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def logprob_entry(tokenizer: Tokenizer, entry: TokenLogprob, *, rivals: int) -> dict[str, object]:
    """Return one position with its `rivals` most likely tokens."""
    return {
        **_token(tokenizer, entry.token_id, entry.logprob),
        "top_logprobs": [_token(tokenizer, token_id, value) for token_id, value in entry.top[:rivals]],
    }


def chat_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprob | None], *, rivals: int
) -> dict[str, object]:
    """Return the `logprobs` object of a chat choice."""
    content = [logprob_entry(tokenizer, entry, rivals=rivals) for entry in entries if entry is not None]
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": max(logprob, FLOOR),
        "bytes": list(tokenizer.token_bytes(token_id)),
        "token_id": token_id,
    }
