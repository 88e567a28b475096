"""The copy of a tokenizer.json document that encodes user text: the same rules, but no control token can
match.

Knows the document's structure; knows nothing of files around it.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import struct
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import cast

from bise.errors import ModelFileError, RequestError
from bise.jsonfile import kind_of, shown
from bise.text.pieces import byte_alphabet
from bise.text.regex_check import repeats_within_repetition
from bise.text.rust_tokenizer import build_encoder

_MAX_GROWTH = 64
"""Characters that a normalizer may put in the place of one; real ones put one or three."""


def text_encoder(
    document: Mapping[str, object], vocab: Mapping[str, int], guarded: Collection[str], name: str
) -> Callable[[str, bool], list[int]]:
    """Return the encoder of (text, at the start of a sequence) that never yields a token of `guarded`.

    `vocab` holds every piece and added token with its id. Raises ModelFileError when the document is
    malformed.
    """
    nonce = secrets.token_hex(16)
    renamed = {text: f"\U000f0000{nonce}:{index}" for index, text in enumerate(sorted(guarded))}
    model = cast(dict[str, object], document["model"])
    plain: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _text_tokens(document.get("added_tokens"), guarded),
        "normalizer": document.get("normalizer"),
        "pre_tokenizer": document.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": None,
        "model": _plain_model(model, vocab, renamed, name),
    }
    _check_charsmaps(document.get("normalizer"), name)
    _check_growth(document.get("normalizer"), name)
    for part in ("normalizer", "pre_tokenizer"):
        _check_patterns(document.get(part), f"{name}: {part}")
    encode = build_encoder(plain, name)
    encode_inner = encode
    later, changed = _without_first_prefix(plain["pre_tokenizer"])
    if changed:
        encode_inner = build_encoder(plain | {"pre_tokenizer": later}, name)
    if _loses_bytes(document, vocab, guarded):
        encode = _refusing_losses(encode, _byte_counts(vocab), name)
        encode_inner = encode
    return lambda text, start: encode(text) if start else encode_inner(text)


def _text_tokens(added: object, guarded: Collection[str]) -> list[dict[str, object]]:
    """Return the added tokens that are text (runs of spaces, say); their form was checked by the reader."""
    entries = cast(list[dict[str, object]], added or [])
    return [
        {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        | entry
        | {"special": False}
        for entry in entries
        if entry["content"] not in guarded
    ]


def _plain_model(
    model: Mapping[str, object], vocab: Mapping[str, int], renamed: Mapping[str, str], name: str
) -> dict[str, object]:
    if model.get("type") == "Unigram":
        scores = [cast(list[object], entry)[1] for entry in cast(list[object], model["vocab"])]
        pieces: list[list[object]] = [[f"\U000f0000{index}", 0.0] for index in range(max(vocab.values()) + 1)]
        for text, token_id in vocab.items():
            pieces[token_id] = [renamed.get(text, text), scores[token_id] if token_id < len(scores) else 0.0]
        return dict(model) | {"vocab": pieces}
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise ModelFileError(
            f"{name}: model.merges must be an array, not {kind_of(merges)}", field="model.merges"
        )
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise ModelFileError(
            f"{name}: model.unk_token {shown(unknown)} is not in the vocabulary", field="model.unk_token"
        )
    return dict(model) | {
        "type": "BPE",
        "vocab": {renamed.get(text, text): token_id for text, token_id in vocab.items()},
        "merges": _plain_merges(cast(list[object], merges), renamed, name),
        "unk_token": renamed.get(unknown, unknown) if isinstance(unknown, str) else unknown,
    }


def _plain_merges(merges: list[object], renamed: Mapping[str, str], name: str) -> list[list[str]]:
    """Return the merges as pairs, without those that touch a guarded piece."""
    result: list[list[str]] = []
    for index, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(cast(list[object], pair)) != 2:
            raise ModelFileError(
                f"{name}: model.merges[{index}] must be two pieces, got {shown(merge)}",
                field="model.merges",
            )
        left, right = cast(list[object], pair)
        if not isinstance(left, str) or not isinstance(right, str):
            raise ModelFileError(f"{name}: model.merges[{index}] must be two strings", field="model.merges")
        if not (left in renamed or right in renamed or left + right in renamed):
            result.append([left, right])
    return result


def _without_first_prefix(component: object) -> tuple[object, bool]:
    """Return a pre-tokenizer that puts no dummy prefix anywhere, and whether it differs: "first" becomes
    "never".
    """
    if not isinstance(component, dict):
        return component, False
    fields = cast(dict[str, object], component)
    if fields.get("type") == "Metaspace" and fields.get("prepend_scheme") == "first":
        return fields | {"prepend_scheme": "never"}, True
    parts = fields.get("pretokenizers")
    if fields.get("type") != "Sequence" or not isinstance(parts, list):
        return fields, False
    rewritten = [_without_first_prefix(part) for part in cast(list[object], parts)]
    return fields | {"pretokenizers": [part for part, _ in rewritten]}, any(
        changed for _, changed in rewritten
    )


def _check_charsmaps(component: object, name: str) -> None:
    """Refuse a malformed SentencePiece character map: the library panics on one, aloud, when it reads or
    uses it.
    """
    if not isinstance(component, dict):
        return
    fields = cast(dict[str, object], component)
    parts = fields.get("normalizers")
    for part in cast(list[object], parts) if isinstance(parts, list) else ():
        _check_charsmaps(part, name)
    if fields.get("type") != "Precompiled":
        return
    reason = "is not base64 text"
    value = fields.get("precompiled_charsmap")
    if isinstance(value, str):
        with suppress(binascii.Error):
            reason = _charsmap_fault(base64.b64decode(value, validate=True))
    if reason:
        raise ModelFileError(
            f"{name}: normalizer.precompiled_charsmap {reason}", field="normalizer.precompiled_charsmap"
        )


def _check_growth(normalizer: object, name: str) -> int:
    """Refuse replacements of nothing, on which the library panics, and ones that blow a text up.

    Returns how many times longer a text can become.
    """
    growth = 1
    if isinstance(normalizer, list):
        for part in cast(list[object], normalizer):
            growth *= _check_growth(part, name)
    elif isinstance(normalizer, dict):
        fields = cast(dict[str, object], normalizer)
        growth = _check_growth(fields.get("normalizers"), name)
        content = fields.get("content")
        if fields.get("type") == "Replace" and isinstance(content, str):
            growth = max(1, len(content))
            pattern = fields.get("pattern")
            if isinstance(pattern, dict) and "" in cast(dict[str, object], pattern).values():
                raise ModelFileError(f"{name}: normalizer replaces an empty text", field="normalizer")
    if growth > _MAX_GROWTH:
        raise ModelFileError(
            f"{name}: normalizer can make a text {growth} times longer; at most {_MAX_GROWTH} make sense",
            field="normalizer",
        )
    return growth


def _check_patterns(component: object, name: str) -> None:
    """Refuse regular expressions that could take endless time, and rules on which the library panics."""
    if isinstance(component, list):
        for part in cast(list[object], component):
            _check_patterns(part, name)
    if not isinstance(component, dict):
        return
    fields = cast(dict[str, object], component)
    if fields.get("type") == "Prepend" and not fields.get("prepend"):
        # The library indexes past the text's end when it prepends nothing.
        raise ModelFileError(f"{name} prepends an empty string", field=name)
    for key, value in fields.items():
        if key == "Regex" and isinstance(value, str) and repeats_within_repetition(value):
            raise ModelFileError(
                f"{name} has a regular expression that repeats a repetition, which can take endless time",
                field=name,
            )
        _check_patterns(value, name)


def _charsmap_fault(data: bytes) -> str:
    """Return what is wrong with a character map, "" when it is sound.

    Layout: size of the trie in bytes (uint32), the trie, then zero-terminated UTF-8 replacements. The
    trie is a double array as darts-clone writes it: a unit (uint32) with its high bit set holds the place
    of a replacement; any other leads to the block of 256 units around (its own place XOR its offset).
    """
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 0 < size <= len(data) - 4:
        return f"claims a trie of {size} bytes in {len(data)}"
    replacements = data[4 + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        return "has replacements that are not UTF-8"
    if not replacements.endswith(b"\0"):
        return "has a replacement without end"
    units = struct.unpack(f"<{size // 4}I", data[4 : 4 + size])
    starts = {0, *(place + 1 for place, byte in enumerate(replacements[:-1]) if byte == 0)}
    for place, unit in enumerate(units):
        if unit >> 31:
            if unit & 0x7FFFFFFF not in starts:
                return f"has a trie that points past its replacements (unit {place})"
        elif (place ^ (unit >> 10 << ((unit & 0x200) >> 6))) | 0xFF >= len(units):
            return f"has a trie that leads out of itself (unit {place})"
    return ""


def _loses_bytes(document: Mapping[str, object], vocab: Mapping[str, int], guarded: Collection[str]) -> bool:
    """Say whether a byte-level vocabulary lacks bytes and has no unknown token, so that text could get
    lost.
    """
    model = cast(dict[str, object], document["model"])
    decoder = document.get("decoder")
    byte_level = isinstance(decoder, dict) and cast(dict[str, object], decoder).get("type") == "ByteLevel"
    return (
        byte_level
        and model.get("unk_token") is None
        and not all(char in vocab and char not in guarded for char in byte_alphabet())
    )


def _byte_counts(vocab: Mapping[str, int]) -> dict[int, int]:
    """Return the number of bytes of each id of a byte-level vocabulary: one per character of the alphabet."""
    alphabet = byte_alphabet()
    return {
        token_id: len(text) if all(char in alphabet for char in text) else len(text.encode("utf-8"))
        for text, token_id in vocab.items()
    }


def _refusing_losses(
    encode: Callable[[str], list[int]], byte_counts: Mapping[int, int], name: str
) -> Callable[[str], list[int]]:
    def checked(text: str) -> list[int]:
        ids = encode(text)
        if sum(byte_counts[token_id] for token_id in ids) < len(text.encode("utf-8")):
            raise RequestError(f"{name}: the vocabulary lacks bytes of this text, which would get lost")
        return ids

    return checked
