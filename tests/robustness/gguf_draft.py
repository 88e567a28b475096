"""A GGUF writer for tests with every number open to abuse, a tiny valid model, and cases of one fault each.

No package is needed: the writer is the format itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}
HUGE = (1 << 64) - 1
DIM, HIDDEN, VOCAB, LAYERS = 32, 64, 48, 1


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Return a string as stored; `length` lies about it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(kind: int, value: float) -> bytes:
    return struct.pack("<I" + _CODES[kind], kind, value)


def array(kind: int, items: list, count: int | None = None) -> bytes:
    """Return an array value; `count` lies about its length; items of ARR arrays are given as bytes."""
    head = struct.pack("<IIQ", ARR, kind, len(items) if count is None else count)
    if kind == STR:
        return head + b"".join(text(item) for item in items)
    if kind not in _CODES:
        return head + b"".join(items)
    return head + struct.pack(f"<{len(items)}{_CODES[kind]}", *items)


def string(value: str | bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", STR) + text(value, length)


@dataclass
class Tensor:
    """One tensor: file-order dimensions, type, and whatever should be wrong with it."""

    name: str | bytes
    dims: list[int]
    kind: int = 0
    data: bytes | None = None
    offset: int | None = None
    num_dims: int | None = None


@dataclass
class Draft:
    """A GGUF file before it is written."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: dict[str, bytes] = field(default_factory=dict)
    more_keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    tail: bytes = b""

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def build(self) -> bytes:
        keys = [(key.encode(), value) for key, value in self.keys.items()] + self.more_keys
        key_count = len(keys) if self.key_count is None else self.key_count
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        out = self.magic + struct.pack("<IQQ", self.version & 0xFFFFFFFF, tensor_count, key_count)
        out += b"".join(text(key) + value for key, value in keys)
        data = b""
        for tensor in self.tensors:
            size = 4
            for dim in tensor.dims:
                size *= dim
            content = bytes(size) if tensor.data is None else tensor.data
            offset = len(data) if tensor.offset is None else tensor.offset
            num_dims = len(tensor.dims) if tensor.num_dims is None else tensor.num_dims
            dims = struct.pack(f"<I{len(tensor.dims)}Q", num_dims, *tensor.dims)
            out += text(tensor.name) + dims + struct.pack("<IQ", tensor.kind, offset)
            data += content + bytes(-len(content) % self.alignment)
        return out + bytes(-len(out) % self.alignment) + data + self.tail


def valid(architecture: str = "llama") -> Draft:
    """Return a tiny valid model of one layer: 4 heads of 8, 2 key/value heads, 48 tokens, tied embeddings."""
    prefix = architecture + "."
    numbers = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": DIM,
        "feed_forward_length": HIDDEN,
    }
    numbers |= {
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "vocab_size": VOCAB,
    }
    draft = Draft(keys={"general.architecture": string(architecture)})
    draft.keys |= {prefix + name: scalar(U32, value) for name, value in numbers.items()}
    draft.keys[prefix + "attention.layer_norm_rms_epsilon"] = scalar(F32, 1e-5)
    draft.keys[prefix + "rope.freq_base"] = scalar(F32, 10000.0)
    draft.keys["tokenizer.ggml.tokens"] = array(STR, [f"t{i}" for i in range(VOCAB)])
    draft.keys["tokenizer.ggml.scores"] = array(F32, [0.0] * VOCAB)
    shapes = {
        "token_embd": [DIM, VOCAB],
        "output_norm": [DIM],
        "blk.0.attn_norm": [DIM],
        "blk.0.ffn_norm": [DIM],
    }
    shapes |= {"blk.0.attn_q": [DIM, 32], "blk.0.attn_k": [DIM, 16], "blk.0.attn_v": [DIM, 16]}
    shapes |= {"blk.0.attn_output": [32, DIM], "blk.0.ffn_gate": [DIM, HIDDEN], "blk.0.ffn_up": [DIM, HIDDEN]}
    shapes["blk.0.ffn_down"] = [HIDDEN, DIM]
    draft.tensors = [Tensor(f"{name}.weight", dims) for name, dims in shapes.items()]
    return draft


@dataclass(frozen=True)
class Case:
    """One file: `make` writes it into a directory and returns the path to open; `error` is a pattern."""

    name: str
    make: Callable[[Path], Path]
    error: str = ""


def case_of(name: str, error: str, change: Callable[[Draft], Draft | bytes | None]) -> Case:
    def make(directory: Path) -> Path:
        draft = valid()
        result = draft if (changed := change(draft)) is None else changed
        path = directory / "model.gguf"
        path.write_bytes(result if isinstance(result, bytes) else result.build())
        return path

    return Case(name, make, error)


def key_of(name: str, error: str, key: str, value: bytes | None) -> Case:
    """Return a case with one key set, or removed when `value` is None."""

    def change(draft: Draft) -> None:
        draft.keys.pop(key, None)
        if value is not None:
            draft.keys[key] = value

    return case_of(name, error, change)


def attribute_of(name: str, error: str, **values: object) -> Case:
    def change(draft: Draft) -> None:
        for attribute, value in values.items():
            setattr(draft, attribute, value)

    return case_of(name, error, change)


def tensor_of(case: str, error: str, tensor: str, /, **values: object) -> Case:
    def change(draft: Draft) -> None:
        target = draft.tensor(tensor)
        for attribute, value in values.items():
            setattr(target, attribute, value)

    return case_of(case, error, change)


def edit_of(edit: Callable[[Draft], object]) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        edit(draft)

    return change
