"""Malformed tokenizer and template files: each case spoils one thing of a small valid model directory."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 300


@dataclass(frozen=True)
class Case:
    """One malformed directory; `spoil` changes the valid one that `write_valid` made."""

    name: str
    spoil: Callable[[Path], None]
    template: bool = False
    """The fault shows when the chat template is loaded, not the tokenizer."""


def alphabet() -> list[str]:
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def valid_document() -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocab = {token: index for index, token in enumerate([*specials, *alphabet(), "ab", "abc"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]},
    }


def write_valid(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(valid_document()))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))


def edit(file: str, *path: object, to: object) -> Callable[[Path], None]:
    """Set one value inside a JSON file; `to` may be a function of the old value."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        place = document
        for key in path[:-1]:
            place = place[key]
        old = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
        place[path[-1]] = to(old) if callable(to) else to
        (folder / file).write_text(json.dumps(document))

    return spoil


def hf(*path: object, to: object) -> Callable[[Path], None]:
    return edit("tokenizer.json", *path, to=to)


def raw(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(data) and None


def without(*path: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        place = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return spoil


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(data: bytes | str) -> dict[str, object]:
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    return {"type": "Precompiled", "precompiled_charsmap": text}


def replaced_by(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Put something else than a file in place of tokenizer.json."""

    def spoil(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        make(folder / "tokenizer.json")

    return spoil


def plus(**entries: int) -> Callable[[dict[str, int]], dict[str, int]]:
    return lambda vocab: vocab | entries


HF_CASES = [
    Case("empty file", raw("tokenizer.json", b"")),
    Case(
        "half a file",
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]) and None,
    ),
    Case("not UTF-8", raw("tokenizer.json", b'{"model": "\xff\xfe"}')),
    Case("an array", raw("tokenizer.json", b"[]")),
    Case("deep nesting", raw("tokenizer.json", b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}")),
    Case("number of 20,000 digits", raw("tokenizer.json", b'{"version":' + b"9" * 20_000 + b"}")),
    Case("duplicate keys", raw("tokenizer.json", b'{"model": {}, "model": {}}')),
    Case("NaN", raw("tokenizer.json", b'{"version": NaN}')),
    Case("lone surrogate", raw("tokenizer.json", b'{"version": "\\ud800"}')),
    Case("sparse file of 64 GiB", lambda f: os.truncate(f / "tokenizer.json", 64 << 30)),
    Case("FIFO", replaced_by(os.mkfifo)),
    Case("directory", replaced_by(os.mkdir)),
    Case("symlink loop", replaced_by(lambda p: p.symlink_to(p))),
    Case("symlink to a device", replaced_by(lambda p: p.symlink_to("/dev/zero"))),
    Case("no model", without("model")),
    Case("model is null", hf("model", to=None)),
    Case("model type unknown", hf("model", "type", to="Quantum")),
    Case("model type WordLevel", hf("model", "type", to="WordLevel")),
    Case("model type a number", hf("model", "type", to=7)),
    Case("no vocab", without("model", "vocab")),
    Case("empty vocab", hf("model", "vocab", to={})),
    Case("vocab an array", hf("model", "vocab", to=["a"])),
    Case("id beyond the model", hf("model", "vocab", to=plus(zz=VOCAB_SIZE))),
    Case("id of 2^32", hf("model", "vocab", to=plus(zz=1 << 32))),
    Case("id of 2^63", hf("model", "vocab", to=plus(zz=1 << 63))),
    Case("id negative", hf("model", "vocab", to=plus(zz=-1))),
    Case("id a string", hf("model", "vocab", to=lambda v: v | {"zz": "270"})),
    Case("id a fraction", hf("model", "vocab", to=lambda v: v | {"zz": 1.5})),
    Case("id a boolean", hf("model", "vocab", to=lambda v: v | {"zz": True})),
    Case("id used twice", hf("model", "vocab", to=plus(zz=5))),
    Case("merges a string", hf("model", "merges", to="a b")),
    Case("merge of one piece", hf("model", "merges", to=[["a"]])),
    Case("merge of three pieces", hf("model", "merges", to=["a b c"])),
    Case("merge of numbers", hf("model", "merges", to=[[1, 2]])),
    Case("merge out of the vocabulary", hf("model", "merges", to=[["a", "zz"]])),
    Case("merge to a missing piece", hf("model", "merges", to=[["c", "d"]])),
    Case("dropout", hf("model", "dropout", to=0.5)),
    Case("dropout a string", hf("model", "dropout", to="x")),
    Case("unknown token missing", hf("model", "unk_token", to="<nope>")),
    Case("unknown token a number", hf("model", "unk_token", to=5)),
    Case("added tokens an object", hf("added_tokens", to={})),
    Case("added token a string", hf("added_tokens", to=["<s>"])),
    Case("added token without content", hf("added_tokens", 0, to={"id": 0})),
    Case("added token of empty content", hf("added_tokens", 0, "content", to="")),
    Case(
        "added token beyond the model",
        hf("added_tokens", 0, to=lambda t: t | {"id": 5000, "content": "<big>"}),
    ),
    Case("added token against the vocab", hf("added_tokens", 0, "id", to=9)),
    Case("added token flag a string", hf("added_tokens", 0, "special", to="yes")),
    Case("broken regex", hf("pre_tokenizer", to=split("(["))),
    Case("regex of unknown class", hf("pre_tokenizer", to=split(r"\p{Nonsense}"))),
    Case("regex of exponential time", hf("pre_tokenizer", to=split("(a+)+$"))),
    Case("unknown pre-tokenizer", hf("pre_tokenizer", "type", to="Nope")),
    Case("pre-tokenizer a string", hf("pre_tokenizer", to="ByteLevel")),
    Case("unknown normalizer", hf("normalizer", to={"type": "Nope"})),
    Case(
        "broken normalizer regex",
        hf("normalizer", to={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    ),
    Case("prepend nothing", hf("normalizer", to={"type": "Prepend", "prepend": ""})),
    Case("charsmap not base64", hf("normalizer", to=charsmap("!!!"))),
    Case("charsmap too short", hf("normalizer", to=charsmap(b"\1\2"))),
    Case(
        "charsmap size beyond its end", hf("normalizer", to=charsmap(struct.pack("<I", 1 << 31) + b"\0" * 8))
    ),
    Case("charsmap size not aligned", hf("normalizer", to=charsmap(struct.pack("<I", 3) + b"\0" * 8))),
    Case("charsmap of random bytes", hf("normalizer", to=charsmap(bytes(range(256)) * 4))),
    Case(
        "charsmap with a broken trie",
        hf("normalizer", to=charsmap(struct.pack("<I", 8) + b"\xff" * 8 + b"x\0")),
    ),
    Case("charsmap a number", hf("normalizer", to={"type": "Precompiled", "precompiled_charsmap": 5})),
    Case("charsmap in a sequence", hf("normalizer", to={"type": "Sequence", "normalizers": [charsmap("!")]})),
    Case("normalizers not an array", hf("normalizer", to={"type": "Sequence", "normalizers": 5})),
    Case("no decoder", hf("decoder", to=None)),
    Case("decoder WordPiece", hf("decoder", to={"type": "WordPiece", "prefix": "##", "cleanup": True})),
    Case("decoder a list", hf("decoder", to=[])),
    Case("decoder sequence of a string", hf("decoder", to={"type": "Sequence", "decoders": "x"})),
    Case(
        "post-processor Bert",
        hf("post_processor", to={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}),
    ),
    Case(
        "post-processor with a missing token",
        hf(
            "post_processor",
            to={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
    ),
    Case(
        "post-processor with two tokens",
        hf(
            "post_processor",
            to={
                "type": "TemplateProcessing",
                "pair": [],
                "special_tokens": {},
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"SpecialToken": {"id": "[INST]", "type_id": 0}},
                ],
            },
        ),
    ),
    Case("eos_token unknown", edit("tokenizer_config.json", "eos_token", to="<nope>")),
    Case("eos_token a number", edit("tokenizer_config.json", "eos_token", to=2)),
    Case("add_bos_token a string", edit("tokenizer_config.json", "add_bos_token", to="yes")),
    Case(
        "added_tokens_decoder with a bad id",
        edit("tokenizer_config.json", "added_tokens_decoder", to={"x": {"content": "y"}}),
    ),
    Case(
        "added_tokens_decoder beyond the model",
        edit(
            "tokenizer_config.json",
            "added_tokens_decoder",
            to={"9999": {"content": "<far>", "special": True}},
        ),
    ),
    Case("added_tokens_decoder an array", edit("tokenizer_config.json", "added_tokens_decoder", to=[])),
    Case("tokenizer_config broken", raw("tokenizer_config.json", b"{")),
    Case("eos id beyond", edit("generation_config.json", "eos_token_id", to=5000)),
    Case("eos id negative", edit("generation_config.json", "eos_token_id", to=-1)),
    Case("eos ids of strings", edit("generation_config.json", "eos_token_id", to=["</s>"])),
    Case("bise_template unknown", edit("tokenizer_config.json", "bise_template", to="v99"), template=True),
    Case("bise_template a number", edit("tokenizer_config.json", "bise_template", to=7), template=True),
    Case("template a number", edit("tokenizer_config.json", "chat_template", to=5), template=True),
    Case("template empty", edit("tokenizer_config.json", "chat_template", to=""), template=True),
    Case(
        "template of 2 MiB", edit("tokenizer_config.json", "chat_template", to="x" * (2 << 20)), template=True
    ),
    Case(
        "template not closed",
        edit("tokenizer_config.json", "chat_template", to="{% for m in messages %}"),
        template=True,
    ),
    Case(
        "template with an unknown tag",
        edit("tokenizer_config.json", "chat_template", to="{% exec x %}"),
        template=True,
    ),
    Case(
        "template with an unknown filter",
        edit("tokenizer_config.json", "chat_template", to="{{ 1 | nope }}"),
        template=True,
    ),
    Case(
        "templates without default",
        edit("tokenizer_config.json", "chat_template", to=[{"name": "a", "template": "b"}]),
        template=True,
    ),
    Case(
        "templates without name",
        edit("tokenizer_config.json", "chat_template", to=[{"template": "b"}]),
        template=True,
    ),
    Case("template file not UTF-8", raw("chat_template.jinja", b"\xff\xfe"), template=True),
    Case("template file a FIFO", lambda f: os.mkfifo(f / "chat_template.jinja"), template=True),
]


def valid_tekken() -> dict[str, object]:
    vocab = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    config = {
        "pattern": r"\p{L}+|\s+|.",
        "num_vocab_tokens": 256,
        "default_vocab_size": 286,
        "default_num_special_tokens": 30,
        "version": "v3",
    }
    return {"config": config, "vocab": vocab, "version": 1, "type": "Tekken"}


def tekken(*path: object, to: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "tekken.json").write_text(json.dumps(valid_tekken()))
        edit("tekken.json", *path, to=to)(folder)

    return spoil


def spm_piece(text: bytes, kind: int = 1, score: float = 0.0) -> bytes:
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def valid_spm() -> bytes:
    trainer = b"\x18\x02"
    pieces = (
        spm_piece(b"<unk>", 2)
        + spm_piece(b"<s>", 3)
        + spm_piece(b"</s>", 3)
        + spm_piece(b"a")
        + spm_piece(b"b")
    )
    return pieces + b"\x12" + bytes([len(trainer)]) + trainer + b"\x1a\x02\x20\x00"


def sparse_spm(folder: Path) -> None:
    with (folder / "tokenizer.model.v3").open("wb") as file:
        file.truncate(64 << 30)


def spm(data: bytes) -> Callable[[Path], None]:
    return raw("tokenizer.model.v3", data)


MISTRAL_CASES = [
    Case("tekken empty", raw("tekken.json", b"")),
    Case("tekken without config", raw("tekken.json", b'{"vocab": []}')),
    Case("tekken version unknown", tekken("config", "version", to="v99")),
    Case("tekken version missing", tekken("config", "version", to=None)),
    Case("tekken broken regex", tekken("config", "pattern", to="([")),
    Case("tekken regex of exponential time", tekken("config", "pattern", to="(?:a|aa)*b")),
    Case("tekken regex a number", tekken("config", "pattern", to=1)),
    Case("tekken size beyond the model", tekken("config", "default_vocab_size", to=1000)),
    Case("tekken size huge", tekken("config", "default_vocab_size", to=1 << 62)),
    Case("tekken size negative", tekken("config", "default_vocab_size", to=-5)),
    Case("tekken more controls than ids", tekken("config", "default_num_special_tokens", to=290)),
    Case("tekken fewer controls than listed", tekken("config", "default_num_special_tokens", to=3)),
    Case("tekken rank wrong", tekken("vocab", 7, "rank", to=8)),
    Case("tekken bad base64", tekken("vocab", 7, "token_bytes", to="***")),
    Case("tekken base64 of nothing", tekken("vocab", 7, "token_bytes", to="")),
    Case("tekken bytes out of order", tekken("vocab", 7, "token_bytes", to="CA==")),
    Case("tekken bytes a number", tekken("vocab", 7, "token_bytes", to=7)),
    Case("tekken entry a string", tekken("vocab", 7, to="x")),
    Case("tekken vocab an object", tekken("vocab", to={})),
    Case("tekken controls an object", tekken("special_tokens", to={})),
    Case("tekken control without text", tekken("special_tokens", to=[{"rank": 0}])),
    Case(
        "tekken controls twice",
        tekken("special_tokens", to=[{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}]),
    ),
    Case("tekken controls without </s>", tekken("special_tokens", to=[{"rank": 0, "token_str": "<s>"}])),
    Case("tekken v13 without controls", tekken("config", "version", to="v13")),
    Case("tekken settings before v15", tekken("model_settings_builder", to={})),
    Case("spm empty", spm(b"")),
    Case("spm text", spm(b"this is no protobuf at all")),
    Case("spm cut", spm(valid_spm()[:30])),
    Case("spm length beyond", spm(b"\x0a\xff\xff\xff\xff\x0f")),
    Case("spm endless number", spm(b"\xff" * 100)),
    Case("spm score NaN", spm(spm_piece(b"c", 1, float("nan")) + valid_spm())),
    Case("spm unknown type", spm(spm_piece(b"c", 9) + valid_spm())),
    Case("spm piece not UTF-8", spm(spm_piece(b"\xff") + valid_spm())),
    Case("spm without unknown", spm(spm_piece(b"</s>", 3) + spm_piece(b"a"))),
    Case("spm without end", spm(spm_piece(b"<unk>", 2) + spm_piece(b"a"))),
    Case("spm two unknowns", spm(spm_piece(b"<unk2>", 2) + valid_spm())),
    Case("spm bytes without the rest", spm(spm_piece(b"<0x41>", 6) + valid_spm())),
    Case("spm char model", spm(valid_spm() + b"\x12\x02\x18\x04")),
    Case("spm character map", spm(valid_spm() + b"\x1a\x04\x12\x02ab")),
    Case("spm version unknown", raw("tokenizer.model.v99", valid_spm())),
    Case(
        "spm too many pieces", spm(valid_spm() + b"".join(spm_piece(b"x%d" % i) for i in range(VOCAB_SIZE)))
    ),
    Case("spm FIFO", lambda f: os.mkfifo(f / "tokenizer.model.v3")),
    Case(
        "spm sparse 64 GiB",
        sparse_spm,
    ),
    Case("spm v3 without [INST]", spm(valid_spm()), template=True),
]


def gguf_bpe(**changes: object) -> dict[str, object]:
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<s>", "</s>", *alphabet(), "ab"],
        "token_type": [3, 3] + [1] * 257,
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return named(base | changes)


def gguf_spm(**changes: object) -> dict[str, object]:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "a", "b", "ab", "\u2581"]
    base = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return named(base | changes)


def named(fields: dict[str, object]) -> dict[str, object]:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


GGUF_CASES = {
    "no model": gguf_spm(model=None),
    "model unknown": gguf_spm(model="bert"),
    "no tokens": gguf_spm(tokens=None),
    "tokens empty": gguf_spm(tokens=[]),
    "tokens a string": gguf_spm(tokens="abc"),
    "tokens of numbers": gguf_spm(tokens=[1, 2]),
    "more tokens than the model": gguf_spm(tokens=["x"] * (VOCAB_SIZE + 1)),
    "no scores": gguf_spm(scores=None),
    "scores too few": gguf_spm(scores=[0.0]),
    "score NaN": gguf_spm(scores=[float("nan")] * 263),
    "score infinite": gguf_spm(scores=[float("inf")] * 263),
    "scores of strings": gguf_spm(scores=["0"] * 263),
    "types too few": gguf_spm(token_type=[1]),
    "type unknown": gguf_spm(token_type=[9] * 263),
    "types of strings": gguf_spm(token_type=["1"] * 263),
    "byte tokens that are none": gguf_spm(token_type=[2, 3, 3] + [6] * 260),
    "bytes missing": gguf_spm(token_type=[2, 3, 3] + [6] * 255 + [1] * 5),
    "bos beyond": gguf_spm(bos_token_id=263),
    "eos negative": gguf_spm(eos_token_id=-1),
    "eos a string": gguf_spm(eos_token_id="2"),
    "eos 2^32 - 1": gguf_spm(eos_token_id=0xFFFFFFFF),
    "add_bos_token a number": gguf_spm(add_bos_token=1),
    "add_space_prefix a string": gguf_spm(add_space_prefix="yes"),
    "pre unknown": gguf_bpe(pre="sauerkraut"),
    "pre a number": gguf_bpe(pre=1),
    "no merges": gguf_bpe(merges=None),
    "merges of numbers": gguf_bpe(merges=[1]),
    "merge of one piece": gguf_bpe(merges=["ab"]),
    "merge of three": gguf_bpe(merges=["a b c"]),
    "merge out of the vocabulary": gguf_bpe(merges=["a zz"]),
    "merge to a missing piece": gguf_bpe(merges=["b c"]),
    "token twice": gguf_bpe(tokens=["<s>", "</s>", *alphabet(), "a"]),
    "no end": gguf_bpe(eos_token_id=None),
    "bos wanted but missing": gguf_bpe(bos_token_id=None, add_bos_token=True),
}
