"""The `tokenizers` library behind a guard: whatever a file makes it do becomes one ModelFileError.

Knows the library's own JSON; knows nothing of where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from bise.errors import ModelFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

T = TypeVar("T")

_MAX_REASON = 160
_PROBE = "Hé, 12\n\t a"
"""A document that fails on this fails on nearly every text, and is refused when it is read."""
_LONG_TEXT = 4096
"""Characters from which the library's batch call pays; it starts a thread pool."""


def build_encoder(specification: dict[str, object], name: str) -> Callable[[str], list[int]]:
    """Return the function from text to ids of a `tokenizer.json` document; errors start with `name`.

    Raises ModelFileError when the library refuses the document or panics on it.
    """
    from tokenizers import Tokenizer as RustTokenizer

    document = json.dumps(specification, ensure_ascii=False)
    tokenizer: RustTokenizer = guarded(lambda: RustTokenizer.from_str(document), f"{name}: is refused")

    def encode(text: str) -> list[int]:
        def ids() -> list[int]:
            if len(text) < _LONG_TEXT:
                return tokenizer.encode(text, add_special_tokens=False).ids
            # Leaves out the offsets of every token, which takes three quarters of the time.
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

        return guarded(ids, f"{name}: fails on a text")

    encode(_PROBE)
    return encode


def guarded(call: Callable[[], T], what: str) -> T:
    """Return `call()`; ModelFileError "`what` (reason)" when the Rust side raises or panics."""
    try:
        return call()
    except Exception as error:  # the library raises bare Exception for every refusal
        raise ModelFileError(f"{what} ({_one_line(error)})", field="tokenizer") from error
    except BaseException as error:
        # A Rust panic is no Exception in Python; pyo3 offers no class to import, so it is known by its name.
        if type(error).__module__ != "pyo3_runtime" or type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{what} ({_one_line(error)})", field="tokenizer") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
