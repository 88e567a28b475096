"""Indexes that lie or lead outside, special files in place of files, directories without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_safetensors import QUERY
from sound_models import (
    Case,
    base_config,
    base_shapes,
    header_of,
    write_file,
    write_index,
    write_model,
    write_sharded,
)

INDEX = "model.safetensors.index.json"


def _index(name: str, change: Callable[[Path, dict[str, str]], object], mentions: str = INDEX) -> Case:
    def build(directory: Path) -> None:
        weight_map: dict[str, Any] = write_sharded(directory)
        if change(directory, weight_map) is None:
            write_index(directory, weight_map)

    return Case("ix_" + name, build, mentions)


def _set_all(shard: object) -> Callable[[Path, dict[str, Any]], None]:
    return lambda _, weight_map: weight_map.update(dict.fromkeys(weight_map, shard))


def _outside_link(directory: Path, _: dict[str, str]) -> None:
    secret = directory.parent / "secret.safetensors"
    (directory / "model-00001-of-00002.safetensors").rename(secret)
    (directory / "model-00001-of-00002.safetensors").symlink_to(secret)


def _index_text(text: bytes) -> Callable[[Path, dict[str, str]], bool]:
    return lambda directory, _: bool((directory / INDEX).write_bytes(text) + 1)


def _with_secret(name: str) -> Callable[[Path, dict[str, str]], None]:
    def change(directory: Path, weight_map: dict[str, str]) -> None:
        shard = directory / "model-00001-of-00002.safetensors"
        (directory.parent / "secret.safetensors").write_bytes(shard.read_bytes())
        target = name.format(outside=directory.parent / "secret.safetensors", inside=directory / shard.name)
        weight_map.update({key: target for key, value in weight_map.items() if value == shard.name})

    return change


def _special(name: str, make: Callable[[Path], object], victim: str = "model.safetensors") -> Case:
    def build(directory: Path) -> None:
        write_model(directory)
        (directory / "README.md").write_text("---\nlicense: mit\n---\n")
        (directory / victim).unlink()
        make(directory / victim)

    return Case(f"sf_{name}_{victim}", build, victim)


def _only(name: str, mentions: str, **files: bytes) -> Case:
    def build(directory: Path) -> None:
        for file, content in files.items():
            (directory / file.replace("__", ".")).write_bytes(content)

    return Case("dir_" + name, build, mentions)


def _moved_outside(victim: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write_model(path.parent)
        outside = path.parent.parent / f"secret-{victim}"
        path.rename(outside) if path.exists() else outside.write_text("---\nlicense: secret\n---\n")
        path.symlink_to(outside)

    return make


INDEXES = [
    _index("empty_file", _index_text(b"")),
    _index("array", _index_text(b"[]")),
    _index("no_weight_map", _index_text(b"{}")),
    _index("metadata_array", _index_text(b'{"metadata": [], "weight_map": {"a": "b.safetensors"}}')),
    _index("weight_map_array", _index_text(b'{"weight_map": []}')),
    _index("weight_map_empty", _index_text(b'{"weight_map": {}}')),
    _index("duplicate_key", _index_text(b'{"weight_map": {"a": "b.safetensors", "a": "b.safetensors"}}')),
    _index("deep", _index_text(b'{"weight_map": ' + b'{"a":' * 100_000)),
    _index("shard_number", _set_all(1)),
    _index("shard_null", _set_all(None)),
    _index("shard_empty", _set_all("")),
    _index("shard_pickle", _set_all("pytorch_model.bin")),
    _index("shard_missing", _set_all("model-00003-of-00002.safetensors"), "model-00003"),
    _index("shard_with_nul", _set_all("a\0b.safetensors"), "a\\x00b"),
    _index("shard_very_long", _set_all("a" * 5000 + ".safetensors"), "aaa"),
    _index("shard_up", _with_secret("../secret.safetensors"), "secret"),
    _index("shard_absolute", _with_secret("{outside}"), "plain file name"),
    _index("shard_absolute_inside", _with_secret("{inside}"), "plain file name"),
    _index("shard_backslash", _with_secret("..\\secret.safetensors"), "secret"),
    _index("shard_dot", _with_secret("./model-00001-of-00002.safetensors"), "plain file name"),
    _index("shard_link_outside", _outside_link, "model-00001"),
    _index("tensor_of_no_shard", lambda _, weight_map: weight_map.__setitem__("more", LAST_SHARD), "more"),
    _index(
        "tensor_in_the_other_shard", lambda _, weight_map: weight_map.__setitem__(QUERY, LAST_SHARD), QUERY
    ),
    _index("tensor_not_listed", lambda _, weight_map: weight_map.pop(QUERY) and None, QUERY),
    _index(
        "one_shard_not_listed",
        lambda _, weight_map: (
            [weight_map.pop(name) for name, shard in list(weight_map.items()) if shard == LAST_SHARD] and None
        ),
        "config.json",
    ),
    _index("index_missing", lambda directory, _: not (directory / INDEX).unlink(), INDEX),
    _index(
        "single_file_too",
        lambda directory, _: write_file(directory / "model.safetensors", *header_of(base_shapes())),
        "model.safetensors",
    ),
]
LAST_SHARD = "model-00002-of-00002.safetensors"

SPECIAL = [
    *(
        _special(name, make, victim)
        for victim in ("model.safetensors", "config.json", "README.md")
        for name, make in {
            "fifo": os.mkfifo,
            "directory": Path.mkdir,
            "link_loop": lambda path: path.symlink_to(path.name),
            "link_to_nothing": lambda path: path.symlink_to("nothing"),
            "link_to_device": lambda path: path.symlink_to("/dev/zero"),
            "link_to_proc": lambda path: path.symlink_to("/proc/self/mem"),
        }.items()
    ),
    _special("link_outside", _moved_outside("model.safetensors")),
    _special("link_outside", _moved_outside("config.json"), "config.json"),
    _special("link_outside", _moved_outside("README.md"), "README.md"),
    Case("dir_empty", lambda directory: None, "no model"),
    _only("config_only", "config.json", config__json=json.dumps(base_config()).encode()),
    _only("weights_only", "config.json", model__safetensors=b""),
    _only("native_weights_only", "params.json", consolidated__safetensors=b""),
    _only(
        "pickle", "pickle", config__json=json.dumps(base_config()).encode(), pytorch_model__bin=b"\x80\x04."
    ),
    _only("native_pickle", "pickle", params__json=b"{}", consolidated__00__pth=b"\x80\x04."),
    _only("adapter", "adapter", adapter_config__json=b"{}", adapter_model__safetensors=b""),
    _only("two_ggufs", ".gguf", a__gguf=b"GGUF", b__gguf=b"GGUF"),
]
