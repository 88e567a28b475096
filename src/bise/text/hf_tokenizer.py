"""Hugging Face tokenizer directories: tokenizer.json and the small files around it.

Owns how the format is read and what is refused. The encoding itself is done by the `tokenizers` library
on a copy of the document in which no control token can match: each is renamed to a string that nobody can
guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bise.errors import ModelFileError
from bise.jsonfile import kind_of, read_json_object, shown
from bise.text.controls import ControlString
from bise.text.hf_document import text_encoder
from bise.text.pieces import (
    BRACKETED,
    PieceTokenizer,
    byte_alphabet,
    byte_level_bytes,
    sentencepiece_bytes,
)

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    """One entry of added_tokens."""

    content: str
    token_id: int
    special: bool
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """What the small files say: names of special tokens, BOS rule, ids that end a text."""

    names: Mapping[str, str]
    """bos_token, eos_token, ...: the token's text."""
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    added: tuple[_Added, ...]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """How pieces become bytes."""

    byte_level: bool
    byte_fallback: bool = False
    space_prefix: bool = False


def load_hf_tokenizer(path: Path, vocab_size: int) -> PieceTokenizer:
    """Read `tokenizer.json` of a directory, with tokenizer_config.json, special_tokens_map.json and eos ids.

    Raises ModelFileError naming the file and the field for whatever the engine could not honour.
    """
    file = path / "tokenizer.json"
    document = read_json_object(file)
    around = _read_surroundings(path)
    model = _object(document.get("model"), file, "model")
    vocab = _read_vocab(model, file)
    added = _read_added(document.get("added_tokens"), file, "added_tokens")
    known = {item.content for item in added}
    added += [item for item in around.added if item.content not in known]
    for item in added:
        if vocab.setdefault(item.content, item.token_id) != item.token_id:
            raise ModelFileError(
                f"{file}: added_tokens gives {item.content!r} the id {item.token_id}, model.vocab the id "
                f"{vocab[item.content]}",
                field="added_tokens",
            )
    _check_ids(vocab, vocab_size, file)
    names = {kind: text for kind, text in around.names.items() if _is_known(kind, text, vocab, path)}
    hidden = _hidden_tokens(vocab, added, names, around.eos_ids, path)
    guarded = hidden | {item.content for item in added if BRACKETED.fullmatch(item.content)}
    decoding = _read_decoder(document, file)
    flags = {item.content: item for item in added}
    return PieceTokenizer(
        pieces=_piece_table(vocab, hidden, decoding),
        control_strings=tuple(
            ControlString(
                text=text,
                token_id=vocab[text],
                eats_left=text in flags and flags[text].lstrip,
                eats_right=text in flags and flags[text].rstrip,
            )
            for text in sorted(guarded, key=vocab.__getitem__)
        ),
        bos_id=_bos_id(document, names, vocab, file),
        adds_bos=_adds_bos(document, around, vocab, file),
        stop_ids=frozenset(
            [*around.eos_ids, *(vocab[text] for kind, text in names.items() if kind == "eos_token")]
        ),
        space_prefix=decoding.space_prefix,
        encoder=text_encoder(document, vocab, guarded, str(file)),
    )


def _object(value: object, file: Path, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ModelFileError(f"{file}: {name} must be an object, not {kind_of(value)}", field=name)
    return cast(dict[str, object], value)


def _read_vocab(model: Mapping[str, object], file: Path) -> dict[str, int]:
    """Return piece -> id of a BPE or Unigram model."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    raw = model.get("vocab")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ModelFileError(
                f"{file}: model.{name} = {model[name]!r} is not supported; only tokenizers without it are",
                field=f"model.{name}",
            )
    if kind == "Unigram" and isinstance(raw, list):
        return _unigram_vocab(cast(list[object], raw), file)
    if kind != "BPE":
        raise ModelFileError(
            f"{file}: model.type {kind!r} is not supported; known: BPE, Unigram", field="model.type"
        )
    vocab = _object(raw, file, "model.vocab")
    for piece, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise ModelFileError(
                f"{file}: model.vocab gives {piece[:40]!r} the id {shown(token_id)}, not a whole number",
                field="model.vocab",
            )
    return cast(dict[str, int], vocab).copy()


def _unigram_vocab(raw: list[object], file: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for token_id, entry in enumerate(raw):
        pair = cast(list[object], entry) if isinstance(entry, list) else []
        if len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) not in (int, float):
            raise ModelFileError(
                f"{file}: model.vocab[{token_id}] must be [piece, score], got {shown(cast(object, entry))}",
                field="model.vocab",
            )
        if vocab.setdefault(pair[0], token_id) != token_id:
            raise ModelFileError(f"{file}: model.vocab has {pair[0][:40]!r} twice", field="model.vocab")
    return vocab


def _read_added(value: object, file: Path, name: str) -> list[_Added]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ModelFileError(f"{file}: {name} must be an array, not {kind_of(value)}", field=name)
    return [_added(entry, file, f"{name}[{index}]") for index, entry in enumerate(cast(list[object], value))]


def _added(entry: object, file: Path, name: str, token_id: int | None = None) -> _Added:
    fields = _object(entry, file, name)
    content, number = fields.get("content"), fields.get("id", token_id)
    flags = {key: fields.get(key, False) for key in ("special", "lstrip", "rstrip", "single_word")}
    if not isinstance(content, str) or not content:
        raise ModelFileError(f"{file}: {name}.content must be a string that is not empty", field=name)
    if type(number) is not int or number < 0:
        raise ModelFileError(
            f"{file}: {name}.id must be a whole number from 0, got {shown(number)}", field=name
        )
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise ModelFileError(
                f"{file}: {name}.{key} must be true or false, not {kind_of(flag)}", field=name
            )
    return _Added(
        content=content,
        token_id=number,
        special=bool(flags["special"]),
        lstrip=bool(flags["lstrip"]),
        rstrip=bool(flags["rstrip"]),
    )


def _check_ids(vocab: Mapping[str, int], vocab_size: int, file: Path) -> None:
    if not vocab:
        raise ModelFileError(f"{file}: model.vocab is empty", field="model.vocab")
    owners: dict[int, str] = {}
    for piece, token_id in vocab.items():
        if token_id >= vocab_size:
            raise ModelFileError(
                f"{file}: the id {token_id} of {piece[:40]!r} is beyond the model's vocabulary of "
                f"{vocab_size}",
                field="model.vocab",
            )
        if owners.setdefault(token_id, piece) != piece:
            raise ModelFileError(
                f"{file}: {owners[token_id][:40]!r} and {piece[:40]!r} share the id {token_id}",
                field="model.vocab",
            )


def _read_surroundings(path: Path) -> _Surroundings:
    """Collect what tokenizer_config, special_tokens_map, generation_config and config say; all are
    optional.
    """
    files = {
        name: read_json_object(path / name) if (path / name).exists() else {}
        for name in (
            "special_tokens_map.json",
            "tokenizer_config.json",
            "generation_config.json",
            "config.json",
        )
    }
    names: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for kind in _NAMED:
            value = files[name].get(kind)
            if isinstance(value, dict):
                value = cast(dict[str, object], value).get("content")
            if value is not None and not isinstance(value, str):
                raise ModelFileError(
                    f"{path / name}: {kind} must be a string, not {kind_of(value)}", field=kind
                )
            if value:
                names[kind] = value
    config = files["tokenizer_config.json"]
    add_bos = config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise ModelFileError(
            f"{path / 'tokenizer_config.json'}: add_bos_token must be true or false, not {kind_of(add_bos)}",
            field="add_bos_token",
        )
    source = "generation_config.json" if "eos_token_id" in files["generation_config.json"] else "config.json"
    eos = files[source].get("eos_token_id")
    entries = cast(list[object], eos) if isinstance(eos, list) else [] if eos is None else [eos]
    for entry in entries:
        if type(entry) is not int or entry < 0:
            raise ModelFileError(
                f"{path / source}: eos_token_id must be a whole number from 0 or a list of such, "
                f"got {shown(cast(object, eos))}",
                field="eos_token_id",
            )
    return _Surroundings(
        names=names,
        add_bos=add_bos,
        eos_ids=tuple(cast(list[int], entries)),
        added=tuple(_added_decoder(config.get("added_tokens_decoder"), path / "tokenizer_config.json")),
    )


def _added_decoder(value: object, file: Path) -> Iterator[_Added]:
    if value is None:
        return
    for key, entry in _object(value, file, "added_tokens_decoder").items():
        name = f"added_tokens_decoder.{key[:20]}"
        if not (key.isdecimal() and key.isascii() and len(key) < 10):
            raise ModelFileError(f"{file}: {name} is not a token id", field="added_tokens_decoder")
        yield _added(entry, file, name, int(key))


def _is_known(kind: str, text: str, vocab: Mapping[str, int], path: Path) -> bool:
    """Say whether a named special token exists; BOS and EOS must, the others do not matter to us."""
    if text in vocab:
        return True
    if kind in ("bos_token", "eos_token"):
        raise ModelFileError(
            f"{path}: {kind} {text[:40]!r} is not in the vocabulary of tokenizer.json", field=kind
        )
    return False


def _hidden_tokens(
    vocab: Mapping[str, int],
    added: list[_Added],
    names: Mapping[str, str],
    eos_ids: tuple[int, ...],
    path: Path,
) -> set[str]:
    """Return the tokens that are no text: special ones, BOS, EOS, unknown, and whatever ends a text."""
    hidden = {item.content for item in added if item.special}
    hidden |= {names[kind] for kind in ("bos_token", "eos_token", "unk_token") if kind in names}
    by_id = {token_id: text for text, token_id in vocab.items()}
    for token_id in eos_ids:
        if token_id not in by_id:
            raise ModelFileError(
                f"{path}: eos_token_id {token_id} is not in the vocabulary of tokenizer.json",
                field="eos_token_id",
            )
        hidden.add(by_id[token_id])
    return hidden


def _steps(component: object, list_name: str, file: Path, name: str) -> list[dict[str, object]]:
    """Return the parts of a decoder, normalizer, pre_tokenizer or post_processor, sequences flattened."""
    if component is None:
        return []
    fields = _object(component, file, name)
    if fields.get("type") != "Sequence":
        return [fields]
    parts = fields.get(list_name)
    if not isinstance(parts, list):
        raise ModelFileError(f"{file}: {name}.{list_name} must be an array", field=name)
    return [step for part in cast(list[object], parts) for step in _steps(part, list_name, file, name)]


def _read_decoder(document: Mapping[str, object], file: Path) -> _Decoding:
    steps = _steps(document.get("decoder"), "decoders", file, "decoder")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _Decoding(byte_level=True)
    byte_fallback = space_prefix = False
    for step in steps:
        match step.get("type"):
            case "ByteFallback":
                byte_fallback = True
            case "Fuse":
                pass
            case "Replace" if step.get("content") == " " and step.get("pattern") == {"String": "\u2581"}:
                pass
            case "Strip" if (
                step.get("content") == " " and step.get("start") in (0, 1) and step.get("stop") == 0
            ):
                space_prefix = space_prefix or step.get("start") == 1
            case "Metaspace" if step.get("replacement") == "\u2581":
                scheme = step.get(
                    "prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"
                )
                space_prefix = space_prefix or scheme != "never"
            case other:
                raise ModelFileError(
                    f"{file}: decoder {shown(other)} as written there is not supported; known: ByteLevel, "
                    "or Replace, ByteFallback, Fuse, Strip, Metaspace as SentencePiece uses them",
                    field="decoder",
                )
    if not steps:
        raise ModelFileError(
            f"{file}: decoder is missing, so that tokens cannot be turned into text", field="decoder"
        )
    return _Decoding(byte_level=False, byte_fallback=byte_fallback, space_prefix=space_prefix)


def _piece_table(vocab: Mapping[str, int], hidden: set[str], decoding: _Decoding) -> list[bytes]:
    table = [b""] * (max(vocab.values()) + 1)
    alphabet = byte_alphabet()
    for piece, token_id in vocab.items():
        if piece in hidden:
            continue
        table[token_id] = (
            byte_level_bytes(piece, alphabet)
            if decoding.byte_level
            else sentencepiece_bytes(piece, byte_fallback=decoding.byte_fallback)
        )
    return table


def _leading_specials(document: Mapping[str, object], vocab: Mapping[str, int], file: Path) -> list[str]:
    """Return the special tokens that the post-processor puts before a text."""
    for step in _steps(document.get("post_processor"), "processors", file, "post_processor"):
        kind = step.get("type")
        if kind == "ByteLevel":
            continue
        if kind != "TemplateProcessing":
            raise ModelFileError(
                f"{file}: post_processor {shown(kind)} is unknown; known: TemplateProcessing, ByteLevel",
                field="post_processor",
            )
        single = step.get("single")
        if not isinstance(single, list):
            raise ModelFileError(f"{file}: post_processor.single must be an array", field="post_processor")
        leading: list[str] = []
        for part in cast(list[object], single):
            special = _object(part, file, "post_processor.single").get("SpecialToken")
            if special is None:
                return leading
            token = str(_object(special, file, "post_processor.single").get("id"))
            table = _object(step.get("special_tokens"), file, "post_processor.special_tokens")
            ids = _object(table.get(token), file, "post_processor.special_tokens").get("ids")
            if ids != [vocab.get(token)]:
                raise ModelFileError(
                    f"{file}: post_processor.special_tokens gives {token[:40]!r} the ids {shown(ids)}, "
                    f"the vocabulary {vocab.get(token)}",
                    field="post_processor.special_tokens",
                )
            leading.append(token)
        return leading
    return []


def _bos_id(
    document: Mapping[str, object], names: Mapping[str, str], vocab: Mapping[str, int], file: Path
) -> int | None:
    leading = _leading_specials(document, vocab, file)
    if len(leading) > 1:
        raise ModelFileError(
            f"{file}: post_processor puts {len(leading)} tokens before a text; bise knows one, BOS",
            field="post_processor",
        )
    name = names.get("bos_token")
    if leading and name is None:
        name = leading[0]
    if leading and leading[0] != name:
        raise ModelFileError(
            f"{file}: post_processor starts a text with {leading[0][:40]!r}, but bos_token is {shown(name)}",
            field="post_processor",
        )
    if name is None:
        return None
    if name not in vocab:
        raise ModelFileError(
            f"{file}: post_processor names {name[:40]!r}, which has no id", field="post_processor"
        )
    return vocab[name]


def _adds_bos(
    document: Mapping[str, object], around: _Surroundings, vocab: Mapping[str, int], file: Path
) -> bool:
    """Say whether plain text gets a BOS: add_bos_token where it is given, else what the post-processor
    does.
    """
    if around.add_bos is not None:
        if around.add_bos and not (_leading_specials(document, vocab, file) or "bos_token" in around.names):
            raise ModelFileError(
                f"{file.parent / 'tokenizer_config.json'}: add_bos_token is true, but there is no bos_token",
                field="add_bos_token",
            )
        return around.add_bos
    return bool(_leading_specials(document, vocab, file))
