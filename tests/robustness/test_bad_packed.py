"""Malformed packed models, and text files that lead elsewhere, are refused in one line naming the file."""

import json
import os
import struct
from pathlib import Path

import pytest

from bise.engine.load import load_model
from bise.errors import ModelFileError, UserError
from bise.model.checkpoint import open_model
from bise.model.packed import GGUF_METADATA_FILE, PACKED_FILE, pack_model
from bise.text.tokenizer import load_tokenizer

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

DIM, VOCAB = 64, 8
CONFIG = {
    "model_type": "mistral", "hidden_size": DIM, "intermediate_size": DIM, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCAB,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None,
    "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": [2, 4],
}  # fmt: skip
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {"type": "ByteFallback"},
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "merges": [],
        "vocab": {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *"abcde"])},
    },
}


def write_model(folder: Path, **tokenizer) -> Path:
    folder.mkdir()
    names = {
        "model.embed_tokens": (VOCAB, DIM), "lm_head": (VOCAB, DIM), "model.norm": (DIM,),
        "model.layers.0.input_layernorm": (DIM,), "model.layers.0.post_attention_layernorm": (DIM,),
    } | {
        f"model.layers.0.{name}_proj": (DIM, DIM)
        for name in (*(f"self_attn.{part}" for part in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in names.items()}
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | tokenizer))
    return folder


@pytest.fixture
def packed(tmp_path) -> Path:
    return pack_model(open_model(write_model(tmp_path / "model")), "q8", tmp_path / "packed")


def rewrite(folder: Path, change) -> None:
    path = folder / PACKED_FILE
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    manifest = change(json.loads(header["__metadata__"]["bise"]))
    header["__metadata__"] = {} if manifest is None else {"bise": json.dumps(manifest)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def configured(**fields):
    return lambda manifest: manifest | {"config": manifest["config"] | fields}


def formatted(value):
    return lambda manifest: manifest | {"formats": dict.fromkeys(manifest["formats"], value)}


MANIFESTS = {
    "no manifest": lambda _: None,
    "a list": lambda _: [],
    "config is a list": lambda manifest: manifest | {"config": []},
    "config is null": lambda manifest: manifest | {"config": None},
    "formats are null": lambda manifest: manifest | {"formats": None},
    "formats are a list": lambda manifest: manifest | {"formats": []},
    "a format is a list": formatted([]),
    "an unknown format": formatted("q5"),
    "formats of another size": formatted("q4"),
    "another version": lambda manifest: manifest | {"version": [1]},
    "family is a number": configured(family=5),
    "windows are a number": configured(windows=5),
    "a million experts": configured(num_layers=1024, num_experts=1024, experts_per_token=1),
    "rope scaling is text": configured(rope_scaling="yarn"),
    "an unknown field": configured(colour="red"),
    "dim is text": configured(dim="64"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_malformed_manifest_of_a_packed_model_is_refused_by_file(name, packed):
    rewrite(packed, MANIFESTS[name])
    with pytest.raises(ModelFileError) as caught:
        open_model(packed)
    assert str(packed / PACKED_FILE) in str(caught.value)


def link_out(path: Path) -> None:
    target = path.parent.parent / "secret"
    target.write_text("{}")
    path.unlink(missing_ok=True)
    path.symlink_to(target)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "a list": lambda path: path.write_text("[]"),
    "elsewhere": link_out,
    "nowhere": lambda path: path.symlink_to("missing"),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.timeout(20)
def test_metadata_of_a_packed_gguf_is_read_from_a_regular_file_only(name, packed):
    SPECIAL[name](packed / GGUF_METADATA_FILE)
    with pytest.raises(ModelFileError, match=GGUF_METADATA_FILE):
        open_model(packed)


def test_packed_weights_behind_a_link_out_of_the_directory_are_refused(packed):
    moved = packed.parent / "elsewhere"
    (packed / PACKED_FILE).rename(moved)
    (packed / PACKED_FILE).symlink_to(moved)
    with pytest.raises(ModelFileError, match="leads outside"):
        open_model(packed)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("target", ["../secret", "missing"])
def test_text_files_that_lead_out_of_the_model_or_nowhere_are_refused(name, target, tmp_path):
    model = write_model(tmp_path / "model")
    (tmp_path / "secret").write_text(json.dumps(TOKENIZER))
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(ModelFileError, match=name):
        load_model(model, quant="none")


def test_packing_copies_no_file_from_behind_a_link_out_of_the_model(tmp_path):
    model = write_model(tmp_path / "model")
    link_out(model / "README.md")
    with pytest.raises(ModelFileError, match=r"README\.md"):
        pack_model(open_model(model), "q8", tmp_path / "packed")


def test_a_packed_model_keeps_the_end_tokens_of_its_configuration(packed):
    assert load_tokenizer(packed, VOCAB).stop_ids == {2, 4}


def test_a_place_where_no_directory_can_be_made_is_the_users_mistake(tmp_path):
    source = open_model(write_model(tmp_path / "model"))
    with pytest.raises(UserError, match="cannot be made"):
        pack_model(source, "q8", tmp_path / "model" / "config.json" / "out")


def replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("x", String=""),
        replace("x" * 100, Regex="."),
        {"type": "Sequence", "normalizers": [replace("x" * 9, String="x")] * 2},
    ],
)
def test_normalizers_that_panic_or_blow_a_text_up_are_refused_quietly(normalizer, tmp_path, capfd):
    model = write_model(tmp_path / "model", normalizer=normalizer)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: normalizer"):
        load_tokenizer(model, VOCAB)
    assert capfd.readouterr().err == ""


def test_a_beginning_of_text_whose_id_differs_from_the_vocabulary_is_refused(tmp_path):
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [99], "tokens": ["<s>"]}},
    }
    with pytest.raises(ModelFileError, match="special_tokens"):
        load_tokenizer(write_model(tmp_path / "model", post_processor=post), VOCAB)


def test_a_bad_vocabulary_of_a_gguf_is_refused_by_file(packed):
    (packed / "tokenizer.json").unlink()
    (packed / GGUF_METADATA_FILE).write_text(json.dumps({"tokenizer.ggml.model": "elvish"}))
    with pytest.raises(ModelFileError) as caught:
        load_model(packed)
    assert str(packed) in str(caught.value)
