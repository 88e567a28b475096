"""Malformed safetensors files, and tensors that do not match their configuration."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sound_models import (
    DELETE,
    Case,
    Header,
    base_shapes,
    header_of,
    write_config,
    write_file,
    write_model,
)

QUERY = "model.layers.0.self_attn.q_proj.weight"
LAST = "lm_head.weight"


def _file_case(name: str, make: Callable[[Path], None], mentions: str = "model.safetensors") -> Case:
    def build(directory: Path) -> None:
        write_config(directory)
        make(directory / "model.safetensors")

    return Case("st_" + name, build, mentions)


def _edited(name: str, edit: Callable[[Header, bytearray], object], mentions: str = QUERY) -> Case:
    def make(path: Path) -> None:
        header, data = header_of(base_shapes())
        edit(header, data)
        write_file(path, header, data)

    return _file_case(name, make, mentions)


def _field(name: str, key: str, value: object) -> Case:
    return _edited(name, lambda header, _: header[QUERY].__setitem__(key, value))


def _raw(name: str, header: bytes, data: bytes = b"", length: int | None = None, mentions: str = "") -> Case:
    return _file_case(
        name, lambda path: write_file(path, header, data, length), mentions or "model.safetensors"
    )


def _swap_offsets(header: Header, _: bytearray) -> None:
    header[QUERY]["data_offsets"].reverse()


def _shift(header: Header, data: bytearray, by: int) -> None:
    """Move the last tensor by some bytes, so that it overlaps its neighbour or leaves a hole."""
    offsets = header[LAST]["data_offsets"]
    header[LAST]["data_offsets"] = [offsets[0] + by, offsets[1] + by]
    if by > 0:
        data.extend(bytes(by))
    else:
        del data[by:]


def _text_of(edit: Callable[[str], str]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        header, data = header_of(base_shapes())
        write_file(path, edit(json.dumps(header)).encode(), data)

    return make


def _whole(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write_file(path, *header_of(base_shapes()))
        path.write_bytes(edit(path.read_bytes()))

    return make


def _sparse(path: Path, size: int, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, size)


SAFETENSORS = [
    _file_case("empty", lambda path: path.write_bytes(b"")),
    _file_case("seven_bytes", lambda path: path.write_bytes(b"\x02" + bytes(6))),
    _file_case("length_only", lambda path: path.write_bytes(bytes(8))),
    _file_case("zero_length", lambda path: write_file(path, b"", bytes(64))),
    _file_case("html_page", lambda path: path.write_bytes(b"<!DOCTYPE html><html>not found</html>")),
    _file_case(
        "git_lfs_pointer", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    ),
    _file_case("zip_archive", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100))),
    _file_case("cut_in_header", _whole(lambda raw: raw[:200])),
    _file_case("cut_in_data", _whole(lambda raw: raw[:-1])),
    _file_case("cut_after_header", _whole(lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")])),
    _file_case("one_byte_more", _whole(lambda raw: raw + b"\0")),
    _file_case("twice", _whole(lambda raw: raw + raw)),
    _file_case("sparse_header_length_64GiB", lambda path: _sparse(path, 1 << 36, (1 << 36) - 8)),
    _file_case("sparse_header_of_zeros", lambda path: _sparse(path, 1 << 30, 100_000_000)),
    _raw("length_max", b"{}", length=(1 << 64) - 1),
    _raw("length_sign_bit", b"{}", length=1 << 63),
    _raw("length_over_limit", b"{}", length=100_000_001),
    _raw("length_one_too_many", b"{}", length=3),
    _raw("length_one_too_few", b"{ }", length=2),
    _raw("no_tensors", b"{}", mentions="hold 0"),
    _raw("array", b"[]"),
    _raw("null", b"null"),
    _raw("text", b'"{}"'),
    _raw("leading_space", b" {}"),
    _raw("byte_order_mark", b"\xef\xbb\xbf{}"),
    _raw("utf16", "{}".encode("utf-16")),
    _raw("not_utf8", b'{"\xff\xfe": 1}'),
    _raw("two_documents", b"{}{}"),
    _raw("trailing_comma", b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},}'),
    _raw("single_quotes", b"{'a': 1}"),
    _raw("comment", b"{/* a */}"),
    _raw("nul_bytes", b"{" + bytes(32)),
    _raw("deep_arrays", b'{"a":' + b"[" * 200_000),
    _raw("deep_objects", b'{"a":' * 200_000),
    _raw("deep_in_metadata", b'{"__metadata__":' + b'{"a":' * 90 + b"1" + b"}" * 91),
    _raw("long_number", b'{"a":{"dtype":"F32","shape":[' + b"9" * 20_000 + b'],"data_offsets":[0,0]}}'),
    _raw("many_values", b'{"a":{"dtype":"F32","shape":[' + b"1," * 3_000_000 + b'1],"data_offsets":[0,0]}}'),
    _raw("many_empty_objects", b"{" + b",".join(b'"%d":{}' % i for i in range(700_000)) + b"}"),
    _raw("metadata_array", b'{"__metadata__":[]}', mentions="__metadata__"),
    _raw("metadata_null", b'{"__metadata__":null}', mentions="__metadata__"),
    _raw("metadata_number", b'{"__metadata__":{"a":1}}', mentions="__metadata__"),
    _raw("metadata_nested", b'{"__metadata__":{"a":{"b":"c"}}}', mentions="__metadata__"),
    _raw("metadata_twice", b'{"__metadata__":{},"__metadata__":{}}', mentions="__metadata__"),
    _raw("lone_surrogate", b'{"__metadata__":{"a":"\\ud800"}}'),
    _file_case(
        "duplicate_tensor", _text_of(lambda text: text[:-1] + ", " + text[1:]), "model.embed_tokens.weight"
    ),
    _file_case(
        "duplicate_dtype",
        _text_of(lambda text: text.replace('"dtype"', '"dtype": "F32", "dtype"', 1)),
        "dtype",
    ),
    _file_case("nan_offset", _text_of(lambda text: text.replace("[0,", "[NaN,", 1))),
    _edited("tensor_is_array", lambda header, _: header.__setitem__(QUERY, [])),
    _edited("tensor_is_null", lambda header, _: header.__setitem__(QUERY, None)),
    _edited("tensor_is_empty", lambda header, _: header.__setitem__(QUERY, {})),
    _edited("no_dtype", lambda header, _: header[QUERY].pop("dtype")),
    _edited("no_shape", lambda header, _: header[QUERY].pop("shape")),
    _edited("no_offsets", lambda header, _: header[QUERY].pop("data_offsets")),
    _edited("more_fields", lambda header, _: header[QUERY].__setitem__("strides", [16, 1])),
    _field("dtype_unknown", "dtype", "F31"),
    _field("dtype_lower_case", "dtype", "f32"),
    _field("dtype_number", "dtype", 4),
    _field("dtype_null", "dtype", None),
    _field("dtype_wider", "dtype", "F64"),
    _field("dtype_narrower", "dtype", "F16"),
    _field("shape_null", "shape", None),
    _field("shape_number", "shape", 256),
    _field("shape_text", "shape", "16,16"),
    _field("shape_negative", "shape", [-16, -16]),
    _field("shape_float", "shape", [16.0, 16]),
    _field("shape_true", "shape", [True, 256]),
    _field("shape_text_inside", "shape", ["16", 16]),
    _field("shape_nested", "shape", [[16], [16]]),
    _field("shape_overflow", "shape", [1 << 62, 4]),
    _field("shape_wraps_to_the_right_size", "shape", [(1 << 62) + 16, 16]),
    _field("shape_beyond_64_bits", "shape", [1 << 64, 16]),
    _field("shape_of_many_ones", "shape", [16, 16] + [1] * 5000),
    _field("shape_zero", "shape", [0, 16]),
    _field("shape_too_big", "shape", [17, 16]),
    _field("offsets_null", "data_offsets", None),
    _field("offsets_one", "data_offsets", [0]),
    _field("offsets_three", "data_offsets", [0, 1, 2]),
    _field("offsets_negative", "data_offsets", [-1024, 0]),
    _field("offsets_float", "data_offsets", [2112.0, 3136.0]),
    _field("offsets_text", "data_offsets", ["2112", "3136"]),
    _field("offsets_huge", "data_offsets", [(1 << 63) - 1024, 1 << 63]),
    _edited(
        "offsets_far",
        lambda header, _: header[QUERY].__setitem__("data_offsets", [1 << 40, (1 << 40) + 1024]),
        "data_offsets",
    ),
    _field("offsets_true", "data_offsets", [False, True]),
    _edited("offsets_reversed", _swap_offsets),
    _edited("overlap", lambda header, data: _shift(header, data, -4), LAST),
    _edited("hole", lambda header, data: _shift(header, data, 4), LAST),
    _edited("same_place_twice", lambda header, _: header.__setitem__("alias", dict(header[QUERY])), "alias"),
]


def _tensors(
    name: str, change: Callable[[dict[str, tuple[int, ...]]], object], mentions: str, **config: Any
) -> Case:
    def build(directory: Path) -> None:
        write_config(directory, config)
        shapes = base_shapes()
        change(shapes)
        write_file(directory / "model.safetensors", *header_of(shapes))

    return Case("tn_" + name, build, mentions)


def _all_as(dtype: str, size: int) -> Case:
    def build(directory: Path) -> None:
        write_config(directory)
        write_file(directory / "model.safetensors", *header_of(base_shapes(), dtype, size))

    return Case(f"tn_dtype_{dtype}", build, dtype)


def _one_as(dtype: str) -> Case:
    """The same bytes under another dtype of equal width."""
    return _edited(f"one_tensor_{dtype}", lambda header, _: header[QUERY].__setitem__("dtype", dtype))


def _truncate_after_opening(directory: Path) -> None:
    """Leave a marker for the test: it cuts the file once the model is open."""
    write_model(directory)
    (directory / "cut-after-opening").write_bytes(b"")


TENSORS = [
    _tensors("missing_projection", lambda shapes: shapes.pop(QUERY), QUERY),
    _tensors("missing_norm", lambda shapes: shapes.pop("model.norm.weight"), "model.norm.weight"),
    _tensors("missing_head", lambda shapes: shapes.pop(LAST), LAST),
    _tensors(
        "missing_embeddings",
        lambda shapes: shapes.pop("model.embed_tokens.weight"),
        "model.embed_tokens.weight",
    ),
    _tensors("extra_layer", lambda shapes: shapes.__setitem__(QUERY.replace(".0.", ".2."), (16, 16)), ".2."),
    _tensors("extra_bias", lambda shapes: shapes.__setitem__(QUERY.replace("weight", "bias"), (16,)), "bias"),
    _tensors("extra_name", lambda shapes: shapes.__setitem__("something", (1,)), "something"),
    _tensors("extra_name_with_escape", lambda shapes: shapes.__setitem__("\x1b[2J", (1,)), "x1b"),
    _tensors("extra_name_empty", lambda shapes: shapes.__setitem__("", (1,)), "model.safetensors"),
    _tensors(
        "rotary_of_a_missing_layer",
        lambda shapes: shapes.__setitem__("model.layers.9.self_attn.rotary_emb.inv_freq", (2,)),
        ".9.",
    ),
    _tensors(
        "transposed",
        lambda shapes: shapes.__setitem__("model.layers.1.mlp.down_proj.weight", (24, 16)),
        "down_proj",
    ),
    _tensors("flat", lambda shapes: shapes.__setitem__(QUERY, (256,)), QUERY),
    _tensors("more_dimensions", lambda shapes: shapes.__setitem__(QUERY, (1, 16, 16)), QUERY),
    _tensors("broadcastable_row", lambda shapes: shapes.__setitem__(QUERY, (1, 16)), QUERY),
    _tensors(
        "broadcastable_norm",
        lambda shapes: shapes.__setitem__("model.norm.weight", (1,)),
        "model.norm.weight",
    ),
    _tensors(
        "norm_as_matrix", lambda shapes: shapes.__setitem__("model.norm.weight", (1, 16)), "model.norm.weight"
    ),
    _tensors("scalar_norm", lambda shapes: shapes.__setitem__("model.norm.weight", ()), "model.norm.weight"),
    _tensors("empty_tensor", lambda shapes: shapes.__setitem__(QUERY, (0, 16)), QUERY),
    _tensors("head_of_another_vocabulary", lambda shapes: shapes.__setitem__(LAST, (31, 16)), LAST),
    _tensors(
        "tied_head_of_another_shape",
        lambda shapes: shapes.__setitem__(LAST, (31, 16)),
        LAST,
        tie_word_embeddings=True,
    ),
    _tensors(
        "dense_for_a_mixture",
        lambda shapes: None,
        "config.json",
        model_type="mixtral",
        architectures=DELETE,
        num_local_experts=2,
        num_experts_per_tok=2,
    ),
    _tensors(
        "no_layers",
        lambda shapes: [shapes.pop(name) for name in list(shapes) if "layers" in name],
        "config.json",
    ),
    _all_as("F64", 8),
    _all_as("I8", 1),
    _all_as("F8_E4M3", 1),
    _all_as("BOOL", 1),
    _one_as("I32"),
    _one_as("U32"),
    Case("tn_cut_while_open", _truncate_after_opening, "model.safetensors", reads=True),
]
