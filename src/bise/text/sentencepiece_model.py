"""SentencePiece vocabularies: read from a .model file, or given as lists, and encoded by the
sentencepiece library.

Owns the protobuf layout. The library only ever sees a model that is written here from checked values,
because it trusts what it loads.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite

from bise.errors import ModelFileError
from bise.text.controls import ControlString
from bise.text.pieces import BRACKETED, PieceTokenizer, sentencepiece_bytes


class PieceType(IntEnum):
    """Kind of a piece; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """A vocabulary and the rules that go with it."""

    pieces: Sequence[Piece]
    unigram: bool = False
    """Unigram model instead of BPE."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False


def spm_tokenizer(
    model: SentencePieceModel,
    name: str,
    *,
    bos_id: int | None,
    adds_bos: bool,
    stop_ids: Collection[int],
    chat_format: str | None = None,
) -> PieceTokenizer:
    """Return the tokenizer of a SentencePiece vocabulary; errors start with `name`."""
    hidden = {
        index
        for index, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.UNUSED)
    } | set(stop_ids)
    guarded = {
        index
        for index, piece in enumerate(model.pieces)
        if piece.type is PieceType.CONTROL
        or index in stop_ids
        or (piece.type is PieceType.USER_DEFINED and BRACKETED.fullmatch(piece.text))
    }
    return PieceTokenizer(
        pieces=[b"" if index in hidden else _piece_bytes(piece) for index, piece in enumerate(model.pieces)],
        control_strings=tuple(
            ControlString(text=model.pieces[index].text, token_id=index)
            for index in sorted(guarded)
            if model.pieces[index].text
        ),
        bos_id=bos_id,
        adds_bos=adds_bos,
        stop_ids=frozenset(stop_ids),
        space_prefix=model.add_dummy_prefix,
        encoder=_library_encoder(model, guarded, name),
        chat_format=chat_format,
    )


def _piece_bytes(piece: Piece) -> bytes:
    return sentencepiece_bytes(piece.text, byte_fallback=piece.type is PieceType.BYTE)


def _library_encoder(
    model: SentencePieceModel, guarded: Collection[int], name: str
) -> Callable[[str, bool], list[int]]:
    from sentencepiece import SentencePieceProcessor

    proto = _serialise(model, guarded)
    try:
        processor = SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError) as error:
        reason = " ".join("".join(char if char.isprintable() else " " for char in str(error)).split())[:160]
        raise ModelFileError(f"{name}: the vocabulary is refused ({reason})", field="tokenizer") from error

    def encode(text: str, start: bool) -> list[int]:
        del start  # SentencePiece puts its dummy prefix before every piece of a conversation
        return processor.encode(text)

    return encode


def parse_model(data: bytes, name: str) -> SentencePieceModel:
    """Read the content of a SentencePiece .model file.

    Raises ModelFileError when it is malformed, or normalises text by a character map (Mistral's and
    Llama's do not).
    """
    pieces: list[Piece] = []
    unigram, byte_fallback, prefix, remove_spaces = True, False, True, True
    for number, value in _fields(data, name):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value, f"{name}: piece {len(pieces)}"))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value, f"{name}: trainer_spec"))
            kind = trainer.get(3, 1)
            if kind not in (1, 2):
                raise ModelFileError(
                    f"{name}: model type {kind} is not supported; known: unigram 1, BPE 2", field=name
                )
            unigram, byte_fallback = kind == 1, bool(trainer.get(35, 0))
            if trainer.get(24):
                raise ModelFileError(f"{name}: treat_whitespace_as_suffix is not supported", field=name)
        elif number in (3, 5) and isinstance(value, bytes):
            normalizer = dict(_fields(value, f"{name}: normalizer_spec"))
            if normalizer.get(2):
                raise ModelFileError(
                    f"{name}: a normalizer with a character map is not supported; known: identity", field=name
                )
            if number == 3:
                prefix, remove_spaces = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
                if not normalizer.get(5, 1):
                    raise ModelFileError(f"{name}: escape_whitespaces = false is not supported", field=name)
    if not pieces:
        raise ModelFileError(f"{name}: holds no pieces, so it is no SentencePiece model", field=name)
    if byte_fallback is not any(piece.type is PieceType.BYTE for piece in pieces):
        raise ModelFileError(
            f"{name}: byte_fallback is {byte_fallback}, but the pieces say otherwise", field=name
        )
    return SentencePieceModel(
        pieces=pieces, unigram=unigram, add_dummy_prefix=prefix, remove_extra_whitespaces=remove_spaces
    )


def _parse_piece(data: bytes, name: str) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data, name):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ModelFileError(f"{name} is not UTF-8", field=name) from error
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not isfinite(score):
        raise ModelFileError(f"{name} ({text[:40]!r}) has the score {score}", field=name)
    try:
        return Piece(text, score, PieceType(kind))
    except ValueError as error:
        raise ModelFileError(f"{name} ({text[:40]!r}) has the unknown type {kind}", field=name) from error


def _fields(data: bytes, name: str) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (field number, value) of a protobuf message: varints, float32 and length-delimited bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position, name)
        number, wire = tag >> 3, tag & 7
        size = {1: 8, 5: 4}.get(wire, 0)
        if wire == 0:
            value, position = _varint(data, position, name)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position, name)
        elif wire not in (1, 5):
            raise ModelFileError(
                f"{name}: is not a protobuf message (wire type {wire} at byte {position})", field=name
            )
        if size > len(data) - position:
            raise ModelFileError(
                f"{name}: claims {size} bytes at byte {position}, but ends at {len(data)}", field=name
            )
        chunk = data[position : position + size]
        position += size
        yield number, struct.unpack("<f", chunk)[0] if wire == 5 else chunk


def _varint(data: bytes, position: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ModelFileError(f"{name}: is not a protobuf message (bad number at byte {position})", field=name)


def _serialise(model: SentencePieceModel, guarded: Collection[int]) -> bytes:
    """Return the protobuf of a model whose guarded pieces cannot match any text.

    Pieces that the library could not tell apart (empty ones, doubles) never match text either and become
    unique.
    """
    nonce = secrets.token_hex(8)
    seen: set[str] = set()
    parts: list[bytes] = []
    for index, piece in enumerate(model.pieces):
        text, kind = piece.text, piece.type
        if index in guarded:
            text, kind = f"\U000f0000{nonce}:{index}", PieceType.CONTROL
        elif not text or text in seen:
            text, kind = f"\U000f0000{nonce}:{index}", PieceType.UNUSED
        seen.add(text)
        body = (
            _bytes_field(1, text.encode("utf-8"))
            + bytes([2 << 3 | 5])
            + struct.pack("<f", piece.score)
            + _int_field(3, kind)
        )
        parts.append(_bytes_field(1, body))
    byte_fallback = any(piece.type is PieceType.BYTE for piece in model.pieces)
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN), 0)
    parts.append(
        _bytes_field(
            2,
            _int_field(3, 1 if model.unigram else 2)
            + _int_field(4, len(model.pieces))
            + _int_field(35, int(byte_fallback))
            + _int_field(40, unknown),
        )
    )
    parts.append(
        _bytes_field(
            3,
            _bytes_field(1, b"identity")
            + _int_field(3, int(model.add_dummy_prefix))
            + _int_field(4, int(model.remove_extra_whitespaces))
            + _int_field(5, 1),
        )
    )
    return b"".join(parts)


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int_field(number: int, value: int) -> bytes:
    return _write_varint(number << 3) + _write_varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _write_varint(number << 3 | 2) + _write_varint(len(value)) + value
