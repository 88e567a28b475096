"""The vocabulary of a model directory as GGUF's key/value pairs, in the terms of llama.cpp.

What llama.cpp cannot express is refused: bise's own reader of these pairs must cut text as the model's
tokenizer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from bise.errors import ModelFileError
from bise.jsonfile import read_bytes, read_json_object
from bise.model.source import ModelSource
from bise.text.gguf_tokenizer import BYTE_LEVEL_PATTERNS
from bise.text.mistral_tokenizer import find_mistral_file
from bise.text.sentencepiece_model import PieceType, parse_model
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

_KEY = "tokenizer.ggml."
_PROBES = (
    "Hello, world! It's 2026, isn't it?", "  two spaces\n\n\tand a tab", "L'été à la plage: 12 345,67 €",
    "日本語のテキスト 中文 한국어", "def f(x):\n    return x ** 2  # ok", "🙂👩‍🚀", "a" * 50,
    "İstanbul ǅ ªº ſ",
)  # fmt: skip


def vocabulary_pairs(source: ModelSource) -> dict[str, object]:
    """Return the tokenizer and chat template of a model as GGUF metadata.

    Raises ModelFileError when they cannot be said in GGUF, or would cut text otherwise.
    """
    if source.kind == "gguf":
        return {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    rows = source.config.vocab_size
    tokenizer = load_tokenizer(source.path, rows)
    pairs = _pieces(source.path, tokenizer, rows)
    pairs[_KEY + "add_bos_token"] = tokenizer.adds_bos
    pairs[_KEY + "add_eos_token"] = False
    if tokenizer.bos_id is not None:
        pairs[_KEY + "bos_token_id"] = tokenizer.bos_id
    ends = sorted(tokenizer.stop_ids)
    for name, token_id in zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False):
        pairs[_KEY + name] = token_id
    _require_equal(source.path, tokenizer, tokenizer_from_gguf(pairs, rows))
    return pairs | dict(_templates(source.path))


def _pieces(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    """Return model, tokens, types, and scores or merges."""
    found = find_mistral_file(path) or find_mistral_file(path, unversioned=True)
    if found is not None and found.kind == "spm":
        return _sentencepiece(found.path, rows)
    if not (path / "tokenizer.json").exists():
        raise ModelFileError(
            f"{path}: GGUF's vocabulary is made from tokenizer.json or tokenizer.model; put the one of the "
            "same model beside the weights",
            field="tokenizer",
        )
    return _byte_level(path / "tokenizer.json", tokenizer, rows)


def _sentencepiece(file: Path, rows: int) -> dict[str, object]:
    model = parse_model(read_bytes(file, max_bytes=64 << 20), str(file))
    if model.unigram:
        raise ModelFileError(
            f"{file}: is a unigram model, which GGUF's `llama` vocabulary is not", field="tokenizer"
        )
    missing = rows - len(model.pieces)
    return {
        _KEY + "model": "llama",
        _KEY + "tokens": [piece.text for piece in model.pieces] + [f"<unused{n}>" for n in range(missing)],
        _KEY + "scores": [piece.score for piece in model.pieces] + [-1e6] * missing,
        _KEY + "token_type": [int(piece.type) for piece in model.pieces] + [int(PieceType.UNUSED)] * missing,
        _KEY + "add_space_prefix": model.add_dummy_prefix,
        _KEY + "remove_extra_whitespaces": model.remove_extra_whitespaces,
    }


def _byte_level(file: Path, tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    document = read_json_object(file)
    model = cast(dict[str, object], document["model"])
    pattern = _pattern(document)
    pre = next((name for name, own in BYTE_LEVEL_PATTERNS.items() if own == pattern), None)
    if model.get("type") != "BPE" or pre is None:
        raise ModelFileError(
            f"{file}: is not a byte-level BPE with the word pattern of {', '.join(BYTE_LEVEL_PATTERNS)}; "
            "llama.cpp knows no other by name, so it cannot be exported",
            field="tokenizer",
        )
    vocab = dict(cast(dict[str, int], model["vocab"]))
    hidden = set(tokenizer.controls.values())
    types = dict.fromkeys(vocab.values(), PieceType.NORMAL)
    for entry in cast(list[dict[str, object]], document.get("added_tokens") or []):
        token_id = cast(int, entry["id"])
        vocab[cast(str, entry["content"])] = token_id
        types[token_id] = PieceType.CONTROL if token_id in hidden else PieceType.USER_DEFINED
    by_id = {token_id: text for text, token_id in vocab.items()}
    ids = range(rows)
    return {
        _KEY + "model": "gpt2",
        _KEY + "pre": pre,
        _KEY + "tokens": [by_id.get(token_id, f"<unused{token_id}>") for token_id in ids],
        _KEY + "token_type": [int(types.get(token_id, PieceType.UNUSED)) for token_id in ids],
        _KEY + "merges": [
            merge if isinstance(merge, str) else " ".join(cast(list[str], merge))
            for merge in cast(list[object], model["merges"])
        ],
        _KEY + "add_space_prefix": False,
    }


def _pattern(document: Mapping[str, object]) -> str | None:
    """Return the one pattern that cuts text into words, None when the rules are others."""
    rules = cast(dict[str, object], document.get("pre_tokenizer") or {})
    parts = cast(list[dict[str, object]], rules.get("pretokenizers", [rules]))
    kinds = [part.get("type") for part in parts]
    if document.get("normalizer") is not None or kinds != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    if split.get("behavior") != "Isolated" or split.get("invert") or level.get("add_prefix_space"):
        return None
    return cast(dict[str, str], split.get("pattern", {})).get("Regex")


def _templates(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the chat template, and the one for tools where there are two."""
    key = "tokenizer.chat_template"
    separate = path / "chat_template.jinja"
    if separate.exists():
        yield key, separate.read_text(encoding="utf-8")
        return
    file = path / "tokenizer_config.json"
    value = read_json_object(file).get("chat_template") if file.exists() else None
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for entry in cast(list[dict[str, str]], value):
            if entry.get("name") in ("default", "tool_use"):
                yield key + ("" if entry["name"] == "default" else ".tool_use"), entry["template"]


def _require_equal(path: Path, ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raise ModelFileError unless two vocabularies cut and spell alike."""
    for token_id in range(ours.vocab_size):
        if ours.token_bytes(token_id) != theirs.token_bytes(token_id):
            raise ModelFileError(
                f"{path}: token {token_id} would be spelled otherwise in GGUF", field="tokenizer"
            )
    words = (ours.decode([token_id]) for token_id in range(ours.vocab_size))
    for text in (*_PROBES, *words):
        if text and "\ufffd" not in text and ours.encode(text) != theirs.encode(text):
            raise ModelFileError(f"{path}: {text!r} would be cut otherwise in GGUF", field="tokenizer")
    if ours.stop_ids != theirs.stop_ids or ours.adds_bos != theirs.adds_bos:
        raise ModelFileError(
            f"{path}: the tokens that end a text, {sorted(ours.stop_ids)}, cannot all be said in GGUF",
            field="tokenizer",
        )
