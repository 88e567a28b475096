"""Mistral's own tokenizer files: Tekken JSON and versioned SentencePiece models.

Owns which file of a directory counts, which chat format it names, and how the files are checked. The
encoding is done by the tiktoken and sentencepiece libraries that mistral-common itself uses.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bise.errors import ModelFileError
from bise.jsonfile import kind_of, read_bytes, read_json_object, shown
from bise.text.controls import ControlString
from bise.text.pieces import PieceTokenizer
from bise.text.regex_check import repeats_within_repetition
from bise.text.rust_tokenizer import guarded
from bise.text.sentencepiece_model import PieceType, parse_model, spm_tokenizer

CHAT_VERSIONS = (1, 2, 3, 7, 11, 13, 15)
"""Chat formats of mistral-common 1.13."""
_VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")
_MAX_TEKKEN_BYTES = 64 << 20
_MAX_MODEL_BYTES = 32 << 20
_SPACE_RUN = 400_000
"""Spaces in a row that are encoded at once: tiktoken's regex engine overflows its stack near a million."""
_LONG_RUN = re.compile(rf"[^\S\r\n]{{{2 * _SPACE_RUN},}}")
_UNLISTED_CONTROLS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    "[/SYSTEM_PROMPT] [TOOL_CONTENT]"
)
"""Control tokens of Tekken files up to v7 that list none, in order of their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralFile:
    """A Mistral tokenizer file of a model directory."""

    path: Path
    kind: str
    """`tekken` or `spm`."""


def find_mistral_file(path: Path, *, unversioned: bool = False) -> MistralFile | None:
    """Return the file that names a chat version: `tekken.json`, then the highest `tokenizer.model.vN`.

    `unversioned` looks for a bare `tokenizer.model` instead, which says nothing about chat formats.
    """
    if unversioned:
        bare = path / "tokenizer.model"
        return MistralFile(path=bare, kind="spm") if bare.exists() else None
    if (path / "tekken.json").exists():
        return MistralFile(path=path / "tekken.json", kind="tekken")
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    versioned = [(int(match[1]), name) for name in names if (match := _VERSIONED.fullmatch(name))]
    return MistralFile(path=path / max(versioned)[1], kind="spm") if versioned else None


def load_mistral_tokenizer(file: MistralFile, vocab_size: int) -> PieceTokenizer:
    """Read a Tekken or SentencePiece file; every id is below `vocab_size`. ModelFileError when it is
    malformed.
    """
    if file.kind == "tekken":
        return _load_tekken(file.path, vocab_size)
    return _load_spm(file.path, vocab_size)


def _load_spm(file: Path, vocab_size: int) -> PieceTokenizer:
    model = parse_model(read_bytes(file, max_bytes=_MAX_MODEL_BYTES), str(file))
    _check_size(len(model.pieces), vocab_size, file)
    match = _VERSIONED.fullmatch(file.name)
    if match and int(match[1]) not in CHAT_VERSIONS:
        raise ModelFileError(
            f"{file}: chat version v{match[1]} is not known; known: {_known()}", field="version"
        )
    ids = {piece.text: index for index, piece in enumerate(model.pieces) if piece.type is PieceType.CONTROL}
    if "</s>" not in ids:
        raise ModelFileError(f"{file}: has no control piece </s>, so a text would never end", field="</s>")
    return spm_tokenizer(
        model,
        str(file),
        bos_id=ids.get("<s>"),
        adds_bos="<s>" in ids,
        stop_ids=[ids["</s>"]],
        chat_format=f"v{int(match[1])}" if match else None,
    )


def _load_tekken(file: Path, vocab_size: int) -> PieceTokenizer:
    document = read_json_object(file, max_bytes=_MAX_TEKKEN_BYTES)
    config = _object(document, "config", file)
    version = config.get("version")
    if version not in [f"v{known}" for known in CHAT_VERSIONS]:
        raise ModelFileError(
            f"{file}: config.version {str(version)[:40]!r} is not known; known: {_known()}",
            field="config.version",
        )
    size = _count(config, "default_vocab_size", file)
    num_controls = _count(config, "default_num_special_tokens", file)
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise ModelFileError(f"{file}: config.pattern must be a regular expression", field="config.pattern")
    if repeats_within_repetition(pattern):
        raise ModelFileError(
            f"{file}: config.pattern repeats a repetition, which can take endless time",
            field="config.pattern",
        )
    _check_size(size, vocab_size, file)
    controls = _tekken_controls(document.get("special_tokens"), num_controls, int(str(version)[1:]), file)
    ranks = _tekken_ranks(document.get("vocab"), size - num_controls, file)
    for name in ("<s>", "</s>"):
        if name not in controls:
            raise ModelFileError(f"{file}: special_tokens lacks {name}", field="special_tokens")
    return PieceTokenizer(
        pieces=[b""] * num_controls + list(ranks),
        control_strings=tuple(
            ControlString(text=text, token_id=index) for index, text in enumerate(controls)
        ),
        bos_id=controls.index("<s>"),
        adds_bos=True,
        stop_ids=frozenset({controls.index("</s>")}),
        space_prefix=False,
        encoder=_tekken_encoder(pattern, ranks, num_controls, file),
        chat_format=f"{version}-tekken",
        model_settings=_default_settings(document, str(version), file),
    )


def _known() -> str:
    return ", ".join(f"v{version}" for version in CHAT_VERSIONS)


def _check_size(size: int, vocab_size: int, file: Path) -> None:
    if size > vocab_size:
        raise ModelFileError(
            f"{file}: has {size} ids, more than the model's vocabulary of {vocab_size}", field="vocab_size"
        )


def _object(document: Mapping[str, object], name: str, file: Path) -> Mapping[str, object]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise ModelFileError(f"{file}: {name} must be an object, not {kind_of(value)}", field=name)
    return cast(dict[str, object], value)


def _count(config: Mapping[str, object], name: str, file: Path) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 1 << 22:
        raise ModelFileError(
            f"{file}: config.{name} must be a count, got {shown(value)}", field=f"config.{name}"
        )
    return value


def _tekken_controls(listed: object, count: int, version: int, file: Path) -> list[str]:
    """Return the text of every control token by id; those that the file does not list get filler names."""
    if listed is None and version > 7:
        raise ModelFileError(
            f"{file}: special_tokens is missing, which v{version} needs", field="special_tokens"
        )
    names = [*_UNLISTED_CONTROLS.split()] if listed is None else list[str]()
    if listed is not None and not isinstance(listed, list):
        raise ModelFileError(
            f"{file}: special_tokens must be an array, not {kind_of(listed)}", field="special_tokens"
        )
    for index, entry in enumerate(cast(list[object], listed or [])):
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        text = fields.get("token_str")
        if not isinstance(text, str) or not text or fields.get("rank") != index:
            raise ModelFileError(
                f"{file}: special_tokens[{index}] must have a token_str and rank {index}, got "
                f"{shown(cast(object, entry))}",
                field="special_tokens",
            )
        names.append(text)
    if len(names) > count or len(set(names)) != len(names):
        raise ModelFileError(
            f"{file}: special_tokens holds {len(names)} entries, which must differ and be at most "
            f"config.default_num_special_tokens = {count}",
            field="special_tokens",
        )
    return names + [f"<SPECIAL_{index}>" for index in range(len(names), count)]


def _tekken_ranks(vocab: object, count: int, file: Path) -> dict[bytes, int]:
    """Return bytes -> rank of the first `count` entries, in order; the first 256 must be the single bytes."""
    if not isinstance(vocab, list):
        raise ModelFileError(f"{file}: vocab must be an array, not {kind_of(vocab)}", field="vocab")
    entries = cast(list[object], vocab)
    if not 256 <= count <= len(entries):
        raise ModelFileError(
            f"{file}: config asks for {count} vocab entries; vocab has {len(entries)}, and 256 is the least",
            field="vocab",
        )
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:count]):
        fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
        text = fields.get("token_bytes")
        try:
            data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except (binascii.Error, ValueError):
            data = b""
        if fields.get("rank") != rank or not data or (rank < 256 and data != bytes([rank])):
            raise ModelFileError(
                f"{file}: vocab[{rank}] must have rank {rank} and token_bytes in base64 (bytes first), got "
                f"{shown(cast(object, entry))}",
                field="vocab",
            )
        if ranks.setdefault(data, rank) != rank:
            raise ModelFileError(f"{file}: vocab[{rank}] repeats vocab[{ranks[data]}]", field="vocab")
    return ranks


def _tekken_encoder(
    pattern: str, ranks: dict[bytes, int], offset: int, file: Path
) -> Callable[[str, bool], list[int]]:
    import tiktoken

    encoding = guarded(
        lambda: tiktoken.Encoding(name="tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}),
        f"{file}: config.pattern is refused",
    )

    sizes = [len(piece) for piece in ranks]

    def encode(text: str, start: bool) -> list[int]:
        del start  # no dummy prefix
        ids: list[int] = []
        for part in _without_long_runs(text):
            ids += guarded(lambda part=part: encoding.encode_ordinary(part), f"{file}: fails on a text")
        if sum(sizes[rank] for rank in ids) != len(text.encode("utf-8")):
            raise ModelFileError(
                f"{file}: config.pattern does not match all of a text, which would get lost",
                field="config.pattern",
            )
        return [rank + offset for rank in ids]

    return encode


def _without_long_runs(text: str) -> list[str]:
    """Cut runs of about a million spaces, on which tiktoken would abort; all other texts stay whole."""
    if len(text) < 2 * _SPACE_RUN:
        return [text]
    cuts = [0]
    for run in _LONG_RUN.finditer(text):
        cuts += range(run.start(), run.end(), _SPACE_RUN)
    return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if begin < end]


def _default_settings(document: Mapping[str, object], version: str, file: Path) -> str:
    """Return the JSON text of the model settings of a request that sets none: the defaults of the file."""
    builder = document.get("model_settings_builder")
    if builder is None and version != "v15":
        return ""
    if version != "v15" or not isinstance(builder, dict):
        raise ModelFileError(
            f"{file}: model_settings_builder must be an object in v15 and absent before",
            field="model_settings_builder",
        )
    effort = cast(dict[str, object], builder).get("reasoning_effort")
    if effort is None:
        return ""
    default = cast(dict[str, object], effort).get("default") if isinstance(effort, dict) else None
    if not isinstance(default, str):
        raise ModelFileError(
            f"{file}: model_settings_builder.reasoning_effort.default must be a string",
            field="model_settings_builder",
        )
    return json.dumps({"reasoning_effort": default}, ensure_ascii=False)
