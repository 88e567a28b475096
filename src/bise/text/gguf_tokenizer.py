"""Vocabularies that GGUF files carry in their key/value pairs.

Owns the keys under tokenizer.ggml and their defaults (those of llama.cpp). Knows nothing of the file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from bise.errors import ModelFileError
from bise.jsonfile import shown
from bise.text.controls import ControlString
from bise.text.hf_document import text_encoder
from bise.text.pieces import BRACKETED, PieceTokenizer, byte_alphabet, byte_level_bytes
from bise.text.sentencepiece_model import Piece, PieceType, SentencePieceModel, spm_tokenizer

_PREFIX = "tokenizer.ggml."
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<end_of_turn>")
"""Control tokens that end a turn in some chat format, whatever key the file forgot."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL_PATTERNS: Mapping[str, str] = {"tekken": _TEKKEN, "llama-bpe": _LLAMA3}
"""Names of tokenizer.ggml.pre whose words one pattern cuts, with that pattern; for whoever writes GGUF."""
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


def _rules(name: str) -> tuple[tuple[str, ...], bool] | None:
    """Return the word patterns of a tokenizer.ggml.pre and whether whole words and BOS come first; None:
    unknown.
    """
    match name:
        case "default":
            return _DEFAULT, False
        case "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo":
            return (_GPT2,), False
        case "llama3" | "llama-v3" | "llama-bpe":
            return (_LLAMA3,), True
        case "smaug-bpe":
            return (_LLAMA3,), False
        case "tekken":
            return (_TEKKEN,), True
        case _:
            return None


def load_gguf_tokenizer(metadata: Mapping[str, object], vocab_size: int) -> PieceTokenizer:
    """Build the tokenizer of a GGUF file's metadata: `llama` (SentencePiece) or `gpt2` (byte-level BPE)."""
    kind = metadata.get(_PREFIX + "model")
    tokens = _strings(metadata, "tokens")
    if tokens is None:
        raise ModelFileError(
            f"{_PREFIX}tokens is missing, so the file has no vocabulary", field=_PREFIX + "tokens"
        )
    if not 0 < len(tokens) <= vocab_size:
        raise ModelFileError(
            f"{_PREFIX}tokens holds {len(tokens)} entries; the model's vocabulary has {vocab_size}",
            field=_PREFIX + "tokens",
        )
    types = _types(metadata, tokens)
    if kind == "llama":
        return _load_spm(metadata, tokens, types)
    if kind == "gpt2":
        return _load_bpe(metadata, tokens, types)
    raise ModelFileError(
        f"{_PREFIX}model {str(kind)[:40]!r} is not supported; known: llama, gpt2", field=_PREFIX + "model"
    )


def _load_spm(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[PieceType]
) -> PieceTokenizer:
    scores = _array(metadata, "scores", len(tokens))
    if scores is None:
        raise ModelFileError(f"{_PREFIX}scores is missing, which `llama` needs", field=_PREFIX + "scores")
    pieces: list[Piece] = []
    for index, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if type(score) not in (int, float) or not abs(cast(float, score)) < 3e38:
            raise ModelFileError(
                f"{_PREFIX}scores[{index}] is {shown(score)}, not a number", field=_PREFIX + "scores"
            )
        pieces.append(Piece(text, float(cast(float, score)), kind))
    prefix = _flag(metadata, "add_space_prefix", default=True)
    bos = _token_id(metadata, "bos_token_id", len(tokens), default=1)
    eos = _token_id(metadata, "eos_token_id", len(tokens), default=2)
    model = SentencePieceModel(
        pieces=pieces,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", default=False),
    )
    return spm_tokenizer(
        model,
        _PREFIX + "tokens",
        bos_id=bos,
        adds_bos=_flag(metadata, "add_bos_token", default=True),
        stop_ids=_stop_ids(metadata, tokens, types, eos),
    )


def _load_bpe(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[PieceType]
) -> PieceTokenizer:
    pre = metadata.get(_PREFIX + "pre", "default")
    rules = _rules(pre) if isinstance(pre, str) else None
    if rules is None:
        raise ModelFileError(
            f"{_PREFIX}pre {shown(pre)} is unknown; known: default, gpt-2, llama-bpe, smaug-bpe, tekken",
            field=_PREFIX + "pre",
        )
    patterns, whole_words = rules
    bos = _token_id(metadata, "bos_token_id", len(tokens), default=None)
    eos = _token_id(metadata, "eos_token_id", len(tokens), default=None)
    stop_ids = _stop_ids(metadata, tokens, types, eos)
    hidden = {
        index for index, kind in enumerate(types) if kind in (PieceType.CONTROL, PieceType.UNKNOWN)
    } | stop_ids
    guarded = hidden | {
        index
        for index, kind in enumerate(types)
        if kind is PieceType.USER_DEFINED and BRACKETED.fullmatch(tokens[index])
    }
    alphabet = byte_alphabet()
    adds_bos = _flag(metadata, "add_bos_token", default=whole_words)
    if adds_bos and bos is None:
        raise ModelFileError(
            f"{_PREFIX}add_bos_token is true, but bos_token_id is missing", field="bos_token_id"
        )
    return PieceTokenizer(
        pieces=[
            b"" if index in hidden or types[index] is PieceType.UNUSED else byte_level_bytes(text, alphabet)
            for index, text in enumerate(tokens)
        ],
        control_strings=tuple(
            ControlString(text=tokens[index], token_id=index) for index in sorted(guarded) if tokens[index]
        ),
        bos_id=bos,
        adds_bos=adds_bos,
        stop_ids=stop_ids,
        space_prefix=False,
        encoder=_bpe_encoder(metadata, tokens, types, guarded, patterns, whole_words),
    )


def _bpe_encoder(
    metadata: Mapping[str, object],
    tokens: Sequence[str],
    types: Sequence[PieceType],
    guarded: set[int],
    patterns: Sequence[str],
    whole_words: bool,
) -> Callable[[str, bool], list[int]]:
    vocab: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if index in guarded or types[index] is PieceType.UNUSED:
            continue
        if vocab.setdefault(text, index) != index:
            raise ModelFileError(
                f"{_PREFIX}tokens[{index}] repeats tokens[{vocab[text]}]", field=_PREFIX + "tokens"
            )
    pairs = _merges(metadata, vocab, {tokens[index] for index in guarded})
    splits: list[dict[str, object]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    level: dict[str, object] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    added: list[dict[str, object]] = [
        {"id": index, "content": tokens[index], "normalized": False}
        for index, kind in enumerate(types)
        if kind is PieceType.USER_DEFINED and index not in guarded
    ]
    document: dict[str, object] = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {}, "merges": pairs, "ignore_merges": whole_words},
    }
    return text_encoder(document, vocab, (), _PREFIX + "tokens")


def _merges(metadata: Mapping[str, object], vocab: Mapping[str, int], guarded: set[str]) -> list[list[str]]:
    """Return the merges as pairs, without those that touch a guarded piece."""
    merges = _strings(metadata, "merges")
    if merges is None:
        raise ModelFileError(f"{_PREFIX}merges is missing, which `gpt2` needs", field=_PREFIX + "merges")
    pairs: list[list[str]] = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelFileError(
                f"{_PREFIX}merges[{index}] must be two pieces, got {merge[:40]!r}", field=_PREFIX + "merges"
            )
        if not guarded.isdisjoint((left, right, left + right)):
            continue
        for piece in (left, right, left + right):
            if piece not in vocab:
                raise ModelFileError(
                    f"{_PREFIX}merges[{index}] needs {piece[:40]!r}, which is not in the vocabulary",
                    field=_PREFIX + "merges",
                )
        pairs.append([left, right])
    return pairs


def _array(metadata: Mapping[str, object], name: str, count: int | None = None) -> list[object] | None:
    """Return an array of the metadata as a list, None when the key is missing."""
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if hasattr(value, "tolist"):
        value = cast(Callable[[], object], getattr(value, "tolist"))()  # noqa: B009  # numpy without importing it
    if not isinstance(value, list | tuple):
        raise ModelFileError(
            f"{_PREFIX}{name} must be an array, not {type(value).__name__}", field=_PREFIX + name
        )
    items = list(cast(Sequence[object], value))
    if count is not None and len(items) != count:
        raise ModelFileError(
            f"{_PREFIX}{name} has {len(items)} entries for {count} tokens", field=_PREFIX + name
        )
    return items


def _strings(metadata: Mapping[str, object], name: str) -> list[str] | None:
    items = _array(metadata, name)
    if items is None:
        return None
    for index, item in enumerate(items):
        if not isinstance(item, str):
            raise ModelFileError(
                f"{_PREFIX}{name}[{index}] must be a string, not {type(item).__name__}", field=_PREFIX + name
            )
    return cast(list[str], items)


def _types(metadata: Mapping[str, object], tokens: Sequence[str]) -> list[PieceType]:
    items = _array(metadata, "token_type", len(tokens))
    if items is None:
        return [PieceType.NORMAL] * len(tokens)
    known = {int(kind): kind for kind in PieceType}
    result: list[PieceType] = []
    for index, item in enumerate(items):
        kind = known.get(item) if type(item) is int else None
        if kind is None:
            raise ModelFileError(
                f"{_PREFIX}token_type[{index}] is {shown(item)}; known: 1 to 6",
                field=_PREFIX + "token_type",
            )
        result.append(kind)
    return result


def _flag(metadata: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise ModelFileError(
            f"{_PREFIX}{name} must be true or false, got {shown(value)}", field=_PREFIX + name
        )
    return value


def _token_id(metadata: Mapping[str, object], name: str, count: int, *, default: int | None) -> int | None:
    value = metadata.get(_PREFIX + name, default if default is None or default < count else None)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise ModelFileError(
            f"{_PREFIX}{name} is {shown(value)}, not one of the {count} token ids", field=_PREFIX + name
        )
    return value


def _stop_ids(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[PieceType], eos: int | None
) -> frozenset[int]:
    named = [
        _token_id(metadata, name, len(tokens), default=None) for name in ("eot_token_id", "eom_token_id")
    ]
    ids = {token_id for token_id in [eos, *named] if token_id is not None}
    ids |= {
        index
        for index, text in enumerate(tokens)
        if text in _END_OF_TURN and types[index] is PieceType.CONTROL
    }
    if not ids:
        raise ModelFileError(
            f"{_PREFIX}eos_token_id is missing, so a text would never end", field=_PREFIX + "eos_token_id"
        )
    return frozenset(ids)
