"""Random changes to valid tokenizer files: each result works or is refused, and nothing else happens."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from bise.errors import ModelFileError, RequestError
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

VALUES = [
    None,
    True,
    0,
    -1,
    1 << 40,
    1.5,
    "",
    "x",
    [],
    {},
    ["a"],
    {"type": "x"},
    [[1]],
    "\u2581",
    "<s>",
    1e300,
]
TEXT = "abc </s> [INST] é 12 "


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bad = _load("bad_tokenizers")


def rich_document() -> dict[str, object]:
    """A document that uses more of the format than the plain one."""
    document = bad.valid_document()
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "x"},
            {"type": "Replace", "pattern": {"String": "q"}, "content": "a"},
            {"type": "NFC"},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [bad.split(r"\s+"), metaspace, document["pre_tokenizer"]],
    }
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return document


def changed(rng: random.Random, document: object) -> object:
    """Replace, delete or move one or two values somewhere inside."""
    result = copy.deepcopy(document)
    for _ in range(rng.randrange(1, 3)):
        node, parent, key = result, None, None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.75):
            parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = node[key]
        if parent is None:
            continue
        choice = rng.random()
        if choice < 0.6:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif choice < 0.8 and isinstance(parent, dict):
            del parent[key]
        elif isinstance(parent, dict):
            parent[rng.choice(list(parent))] = node
        else:
            parent.append(node)
    return result


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Change, drop or splice bytes."""
    result = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        choice = rng.random()
        if choice < 0.6:
            result[rng.randrange(len(result))] = rng.randrange(256)
        elif choice < 0.8:
            place = rng.randrange(len(result))
            del result[place : place + rng.randrange(5)]
        else:
            result = result[: rng.randrange(1, len(result) + 1)] + result[rng.randrange(len(result)) :]
    return bytes(result)


def survives(load: Callable[[], Tokenizer]) -> bool:
    """Load and use; True when it worked, False when it was refused."""
    try:
        tokenizer = load()
        ids = tokenizer.encode(TEXT)
        assert all(0 <= token_id < bad.VOCAB_SIZE for token_id in ids)
        tokenizer.decode(ids)
    except (ModelFileError, RequestError):
        return False
    return True


@pytest.mark.parametrize("kind", ["json", "bytes", "around", "tekken", "spm", "gguf"])
def test_changed_files_work_or_are_refused(kind, tmp_path, capfd):
    rng = random.Random(f"fuzz {kind}")
    bad.write_valid(tmp_path)
    plain = (tmp_path / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>"}}

    def step() -> bool:
        if kind == "json":
            (tmp_path / "tokenizer.json").write_text(json.dumps(changed(rng, rich_document())))
        elif kind == "bytes":
            (tmp_path / "tokenizer.json").write_bytes(damaged(rng, plain))
        elif kind == "around":
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed(rng, config)))
            (tmp_path / "generation_config.json").write_text(
                json.dumps(changed(rng, {"eos_token_id": [2, 1]}))
            )
        elif kind == "tekken":
            (tmp_path / "tekken.json").write_text(json.dumps(changed(rng, bad.valid_tekken())))
        elif kind == "spm":
            (tmp_path / "tokenizer.model.v3").write_bytes(damaged(rng, bad.valid_spm()))
        else:
            metadata = changed(rng, rng.choice([bad.gguf_spm, bad.gguf_bpe])())
            return survives(lambda: tokenizer_from_gguf(metadata, bad.VOCAB_SIZE))
        return survives(lambda: load_tokenizer(tmp_path, bad.VOCAB_SIZE))

    outcomes = [step() for _ in range(150)]
    assert {True, False} == set(outcomes)
    assert "panicked" not in capfd.readouterr().err
