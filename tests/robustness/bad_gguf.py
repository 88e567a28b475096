"""GGUF files with a fault of the container: counts, lengths, types, offsets, file kinds."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gguf_draft import (
    ARR,
    BOOL,
    DIM,
    F32,
    F64,
    HIDDEN,
    HUGE,
    STR,
    U8,
    U16,
    U32,
    U64,
    Case,
    Draft,
    Tensor,
    array,
    attribute_of,
    case_of,
    edit_of,
    key_of,
    scalar,
    string,
    tensor_of,
    text,
    valid,
)


def _nested(depth: int) -> bytes:
    value = array(U8, [1])
    for _ in range(depth):
        value = struct.pack("<IIQ", ARR, ARR, 1) + value[4:]
    return value


def _fifo(directory: Path) -> Path:
    os.mkfifo(directory / "model.gguf")
    return directory / "model.gguf"


def _directory(directory: Path) -> Path:
    (directory / "model.gguf").mkdir()
    return directory / "model.gguf"


def _loop(directory: Path) -> Path:
    (directory / "model.gguf").symlink_to("model.gguf")
    return directory / "model.gguf"


def _device(directory: Path) -> Path:
    (directory / "model.gguf").symlink_to("/dev/zero")
    return directory / "model.gguf"


def _outside_part(directory: Path) -> Path:
    """Return part 1 of 2 whose second part is a link that leaves the model's directory."""
    inside = directory / "model"
    inside.mkdir()
    (directory / "secret.gguf").write_bytes(valid().build())
    (inside / "m-00002-of-00002.gguf").symlink_to(directory / "secret.gguf")
    draft = valid()
    draft.keys |= {"split.no": scalar(U16, 0), "split.count": scalar(U16, 2)}
    (inside / "m-00001-of-00002.gguf").write_bytes(draft.build())
    return inside / "m-00001-of-00002.gguf"


def _sparse(directory: Path) -> Path:
    """Return a file that claims a 64 GiB embedding and is a hole of that size: refused unread."""
    draft = valid()
    draft.tensors = [Tensor("token_embd.weight", [DIM, 1 << 29], data=b""), *draft.tensors[1:]]
    data = draft.build()
    path = directory / "model.gguf"
    path.write_bytes(data)
    os.truncate(path, len(data) + (1 << 36))
    return path


FILE_CASES = [
    Case("fifo", _fifo, "is a FIFO, not a regular file"),
    Case("directory", _directory, "is a directory, not a regular file"),
    Case("symlink loop", _loop, "cannot be read"),
    Case("device", _device, "is a device, not a regular file"),
    Case("missing", lambda directory: directory / "model.gguf", "does not exist"),
    Case("split part outside the directory", _outside_part, "leads outside the model directory"),
    Case("sparse file with an absurd tensor", _sparse, "token_embd.weight|attn"),
    case_of("empty", "is not a GGUF file: 0 bytes", lambda draft: b""),
    case_of("magic only", "is not a GGUF file: 4 bytes", lambda draft: b"GGUF"),
    case_of("cut in the counts", "is not a GGUF file: 20 bytes", lambda draft: draft.build()[:20]),
    case_of(
        "header without content", "tensor count 11 does not fit|key count", lambda draft: draft.build()[:24]
    ),
    attribute_of("wrong magic", "it starts with b'GGML'", magic=b"GGML"),
    attribute_of("zip archive", "it starts with b'PK", magic=b"PK\x03\x04"),
    attribute_of("swapped magic", "bytes swapped", magic=b"FUGG"),
    attribute_of("version 0", "GGUF version 0; supported are 2 and 3", version=0),
    attribute_of("version 1", "GGUF version 1 of 2023", version=1),
    attribute_of("version 4", "GGUF version 4; supported", version=4),
    attribute_of("version of ones", "GGUF version 4294967295", version=0xFFFFFFFF),
    attribute_of("big-endian", "big-endian GGUF file", version=3 << 24),
]

COUNT_CASES = [
    attribute_of("key count of ones", f"key count {HUGE} does not fit", key_count=HUGE),
    attribute_of("key count too large", "key count 1000000 does not fit", key_count=10**6),
    attribute_of("key count one short", "", key_count=12),
    attribute_of("key count one more", "", key_count=14),
    attribute_of("tensor count of ones", f"tensor count {HUGE} does not fit", tensor_count=HUGE),
    attribute_of("tensor count too large", "tensor count 1000000 does not fit", tensor_count=10**6),
    attribute_of("tensor count one short", "", tensor_count=10),
    attribute_of("tensor count one more", "", tensor_count=12),
    attribute_of("tensor count zero", "belong to no tensor", tensor_count=0),
    case_of("no tensors", "has no tensors", lambda draft: Draft(keys=draft.keys).build()),
    case_of("cut in the key names", "past the end|at most fit", lambda draft: draft.build()[:400]),
    case_of(
        "cut in the tensor directory", "past the end|larger than the file", lambda draft: draft.build()[:1750]
    ),
    case_of("cut in the data", "cut short or damaged", lambda draft: draft.build()[:-5000]),
    case_of("one byte short", "ends 1 bytes past the end", lambda draft: draft.build()[:-1]),
    attribute_of("bytes after the data", "64 bytes after the last tensor", tail=bytes(64)),
]

KEY_CASES = [
    case_of(
        "key twice",
        "general.architecture occurs twice",
        lambda d: d.more_keys.append((b"general.architecture", string("llama"))),
    ),
    attribute_of("empty key name", "key name '' is not printable", more_keys=[(b"", scalar(U8, 1))]),
    attribute_of(
        "key name with a newline", r"key name 'a\\nb' is not printable", more_keys=[(b"a\nb", scalar(U8, 1))]
    ),
    attribute_of(
        "key name with an escape sequence", "is not printable", more_keys=[(b"\x1b[2J", scalar(U8, 1))]
    ),
    attribute_of("key name not UTF-8", "not UTF-8", more_keys=[(b"\xff\xfe", scalar(U8, 1))]),
    attribute_of("key name too long", "65535 at most fit", more_keys=[(b"k" * 65536, scalar(U8, 1))]),
    key_of(
        "value type 13", "general.x has the unknown value type 13", "general.x", struct.pack("<II", 13, 0)
    ),
    key_of(
        "value type of ones", "unknown value type 4294967295", "general.x", struct.pack("<II", 0xFFFFFFFF, 0)
    ),
    key_of("bool of 2", "general.x is a bool with the value 2", "general.x", scalar(BOOL, 2)),
    key_of("bool array with 7", "array of bools with the value 7", "general.x", array(BOOL, [0, 1, 7])),
    key_of(
        "string length of ones", f"general.x has a string of {HUGE} bytes", "general.x", string("abc", HUGE)
    ),
    key_of("string length past the end", "has a string of 999999 bytes", "general.x", string("abc", 999999)),
    key_of("string length 2^63", "has a string of 9223372036854775808", "general.x", string("abc", 1 << 63)),
    key_of("string not UTF-8", "general.x has a string that is not UTF-8", "general.x", string(b"\xc3\x28")),
    key_of(
        "array count of ones", f"general.x is an array of {HUGE} elements", "general.x", array(U8, [], HUGE)
    ),
    key_of("array of f64, count 2^61", "2305843009213693952 elements", "general.x", array(F64, [], 1 << 61)),
    key_of(
        "string array count of ones", f"an array of {HUGE} elements", "general.x", array(STR, ["a"], HUGE)
    ),
    key_of(
        "string array count past the end",
        "an array of 5000000 elements",
        "general.x",
        array(STR, ["a"], 5_000_000),
    ),
    key_of(
        "token with a length of ones",
        r"tokens\[0\] has 18446744073709551615",
        "tokenizer.ggml.tokens",
        array(STR, [], 1) + text("a", HUGE),
    ),
    key_of(
        "token past the end",
        "bytes past the end",
        "tokenizer.ggml.tokens",
        array(STR, [], 1) + text("a", 99999),
    ),
    key_of(
        "token not UTF-8", r"tokens\[1\] is not UTF-8", "tokenizer.ggml.tokens", array(STR, ["a", b"\x80"])
    ),
    key_of("array of an unknown type", "array of the unknown value type 99", "general.x", array(99, [], 1)),
    key_of("arrays nested four deep", "nested deeper than 3", "general.x", _nested(4)),
    key_of("arrays nested a thousand deep", "nested deeper than 3", "general.x", _nested(1000)),
    key_of(
        "array of arrays, count of ones", f"an array of {HUGE} elements", "general.x", array(ARR, [], HUGE)
    ),
]

ALIGNMENT_CASES = [
    key_of(
        "alignment 0", "general.alignment must be a power of two, got 0", "general.alignment", scalar(U32, 0)
    ),
    key_of("alignment 3", "power of two, got 3", "general.alignment", scalar(U32, 3)),
    key_of("alignment 48", "power of two, got 48", "general.alignment", scalar(U32, 48)),
    key_of("alignment of ones", "power of two, got 4294967295", "general.alignment", scalar(U32, 0xFFFFFFFF)),
    key_of(
        "alignment 2^31",
        "general.alignment|past the end|not a multiple",
        "general.alignment",
        scalar(U32, 1 << 31),
    ),
    key_of(
        "alignment other than the data's",
        "not a multiple of 64|belong to no tensor|past the end",
        "general.alignment",
        scalar(U32, 64),
    ),
    key_of("alignment as a string", "general.alignment must be a u32", "general.alignment", string("32")),
    key_of("alignment as a u64", "general.alignment must be a u32", "general.alignment", scalar(U64, 32)),
    key_of("alignment as a float", "general.alignment must be a u32", "general.alignment", scalar(F32, 32.0)),
]


def _renamed_length(draft: Draft) -> bytes:
    built = draft.build()
    at = built.index(b"token_embd.weight") - 8
    return built[:at] + struct.pack("<Q", HUGE) + built[at + 8 :]


Q, UP, NORM = "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output_norm.weight"
TENSOR_CASES = [
    tensor_of("no dimensions", "has 0 dimensions", NORM, dims=[]),
    tensor_of("five dimensions", "has 5 dimensions", Q, dims=[DIM, 32, 1, 1, 1]),
    tensor_of("dimension count of ones", "has 4294967295 dimensions", Q, num_dims=0xFFFFFFFF),
    tensor_of("dimension zero", "has a dimension of 0", Q, dims=[DIM, 0], data=bytes(4096)),
    tensor_of("row length zero", "has a dimension of 0", Q, dims=[0, 32], data=bytes(4096)),
    tensor_of("dimension of ones", "larger than the file", Q, dims=[DIM, HUGE], data=bytes(4096)),
    tensor_of(
        "dimensions that overflow to the right size",
        "larger than the file",
        Q,
        dims=[DIM, 32 + (1 << 59)],
        data=bytes(4096),
    ),
    tensor_of(
        "dimensions that multiply to 2^64",
        "larger than the file",
        Q,
        dims=[1 << 32, 1 << 32],
        data=bytes(4096),
    ),
    tensor_of("row count one too many", "overlaps|past the end", Q, dims=[DIM, 33], data=bytes(4096)),
    tensor_of("type 4, removed", r"type 4 \(Q4_2 \(removed\)\)", Q, kind=4),
    tensor_of("type 16, IQ2_XXS", r"type 16 \(IQ2_XXS\); supported are F32", Q, kind=16),
    tensor_of("type 28, F64", r"type 28 \(F64\)", Q, kind=28),
    tensor_of("type of ones", r"type 4294967295 \(unknown\)", Q, kind=0xFFFFFFFF),
    tensor_of("rows that are not whole blocks", "rows of 32 values, not whole Q4_K blocks", Q, kind=12),
    tensor_of("offset not aligned", "not a multiple of 32", NORM, offset=6145),
    tensor_of("offset of ones", "not a multiple|past the end", NORM, offset=HUGE),
    tensor_of("offset 2^64 - 32", "past the end", NORM, offset=HUGE - 31),
    tensor_of("offset past the end", "past the end", NORM, offset=1 << 20),
    tensor_of("two tensors in one place", "overlaps", Q, offset=0),
    tensor_of("overlap by one alignment unit", "overlaps|belong to no tensor", UP, offset=96 * 128),
    tensor_of("name twice", f"'{NORM}' occurs twice", "blk.0.attn_norm.weight", name=NORM),
    tensor_of("name empty", "tensor '' has|tensors that are no part|missing", Q, name=""),
    tensor_of("name of 65 bytes", "a tensor name has a string of 65 bytes", Q, name="n" * 65),
    tensor_of("name not UTF-8", "not UTF-8", Q, name=b"\xff"),
    tensor_of("name with an escape sequence", "is missing", Q, name="\x1b[31m"),
    case_of("name length of ones", f"a tensor name has a string of {HUGE} bytes", _renamed_length),
    case_of(
        "hole between tensors",
        "belong to no tensor",
        edit_of(lambda d: setattr(d.tensors[-2], "data", bytes(4 * DIM * HIDDEN + 32))),
    ),
]


CONTAINER_CASES = [*FILE_CASES, *COUNT_CASES, *KEY_CASES, *ALIGNMENT_CASES, *TENSOR_CASES]
