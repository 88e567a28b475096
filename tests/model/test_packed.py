"""Packing on load, the packed file, and its cache."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bise.errors import BiseError, ConfigError, ModelFileError
from bise.kernels.cpu import CpuOps
from bise.model import packed as packed_module
from bise.model.checkpoint import open_model
from bise.model.pack import pack_weights, plan_packing
from bise.model.packed import (
    PACKED_FILE,
    cache_path,
    content_hash,
    load_packed,
    open_packed,
    pack_model,
    read_packed,
)
from bise.model.packed_writer import PackedWriter

safetensors_numpy = pytest.importorskip("safetensors.numpy")
gguf = pytest.importorskip("gguf")

DIM, HIDDEN, VOCAB = 64, 96, 48


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
    }
    layer = "model.layers.0."
    for name, shape in {
        "self_attn.q_proj": (64, DIM),
        "self_attn.k_proj": (32, DIM),
        "self_attn.v_proj": (32, DIM),
        "self_attn.o_proj": (DIM, 64),
        "mlp.gate_proj": (HIDDEN, DIM),
        "mlp.up_proj": (HIDDEN, DIM),
        "mlp.down_proj": (DIM, HIDDEN),
    }.items():
        found[f"{layer}{name}.weight"] = shape
    found[layer + "input_layernorm.weight"] = (DIM,)
    found[layer + "post_attention_layernorm.weight"] = (DIM,)
    found["lm_head.weight"] = (VOCAB, DIM)
    return found


def write_model(directory: Path, change=None) -> Path:
    directory.mkdir()
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 32,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()}
    if change:
        change(tensors)
    safetensors_numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packed_module, "CACHE_MINIMUM_BYTES", 1)
    return tmp_path / "home"


def unpacked(weights) -> dict[str, bytes]:
    return {
        slot.name: weights.memory[slot.offset :][: slot.size_bytes].tobytes() for slot in weights.plan.slots
    }


def cached_files(home: Path) -> list[Path]:
    return sorted(path for path in (home / "cache" / "packed").glob("*") if path.is_file())


@pytest.mark.parametrize("quant", ["q4", "q8", "bf16", "none", "auto"])
def test_a_packed_directory_holds_the_same_panels_as_packing_on_load(tmp_path, home, quant):
    source = open_model(write_model(tmp_path / "model"))
    direct = pack_weights(source, quant, CpuOps(2))
    out = pack_model(source, quant, tmp_path / "packed")
    again = open_model(out)
    assert again.kind == "packed"
    assert again.config == source.config
    assert (out / "tokenizer.json").read_text() == "{}"
    assert unpacked(load_packed(again, "auto", CpuOps(1))[0]) == unpacked(direct)


def test_a_second_load_reads_the_cache_and_packs_nothing(tmp_path, home, monkeypatch):
    source = open_model(write_model(tmp_path / "model"))
    first, notes = load_packed(source, "q4", CpuOps(1))
    assert len(cached_files(home)) == 1

    def refuse(*_):
        raise AssertionError("packed again")

    monkeypatch.setattr(packed_module, "pack_weights", refuse)
    second, same_notes = load_packed(source, "q4", CpuOps(1))
    assert unpacked(second) == unpacked(first)
    assert same_notes == notes == (
        "2 matrices converted from F32 to q8",
        "7 matrices converted from F32 to q4",
    )  # fmt: skip


def test_the_cache_follows_the_content_not_the_place(tmp_path, home):
    write_model(tmp_path / "one")
    write_model(tmp_path / "two")
    write_model(tmp_path / "other", lambda t: t["model.norm.weight"].__setitem__(0, 5))
    one, two, other = (cache_path(open_model(tmp_path / name), "q8") for name in ("one", "two", "other"))
    assert one == two
    assert one != other
    assert one != cache_path(open_model(tmp_path / "one"), "q4")


def test_a_changed_file_under_the_same_name_is_packed_anew(tmp_path, home):
    directory = write_model(tmp_path / "model")
    before = cache_path(open_model(directory), "q8")
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(bytes(data))
    assert cache_path(open_model(directory), "q8") != before


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_file_is_made_anew(tmp_path, home, damage):
    source = open_model(write_model(tmp_path / "model"))
    first, _ = load_packed(source, "q8", CpuOps(1))
    path = cached_files(home)[0]
    sound = path.read_bytes()
    path.write_bytes(sound[:-7] if damage is None else damage)
    second, _ = load_packed(source, "q8", CpuOps(1))
    assert unpacked(second) == unpacked(first)
    assert path.read_bytes() == sound


def test_a_full_disk_costs_the_cache_but_not_the_start(tmp_path, home, monkeypatch):
    source = open_model(write_model(tmp_path / "model"))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_module.os, "fsync", full)
    weights, notes = load_packed(source, "q8", CpuOps(1))
    assert unpacked(weights) == unpacked(pack_weights(source, "q8", CpuOps(1)))
    assert notes[-1].startswith("the packed weights could not be cached at")
    assert notes[-1].endswith("No space left on device")
    assert cached_files(home) == []
    with pytest.raises(BiseError, match="could not be written: No space left on device"):
        pack_model(source, "q8", tmp_path / "out")
    assert not (tmp_path / "out" / PACKED_FILE).exists()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
@pytest.mark.parametrize("quant", ["q4", "none"])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, value, name, quant):
    def spoil(tensors):
        tensors[name].flat[7] = value

    source = open_model(write_model(tmp_path / "model", spoil))
    ours = "norm" if name == "model.norm.weight" else r"layers\.0\.w2"
    with pytest.raises(
        ModelFileError, match=rf"weight {ours} has a value that is NaN, infinite or too large"
    ):
        pack_weights(source, quant, CpuOps(1))


def test_gguf_blocks_keep_their_values_and_other_widths_are_named(tmp_path):
    source = open_model(write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q5_0))
    plan = plan_packing(source, "auto")
    assert plan.notes == ()
    assert {slot.packed_format for slot in plan.slots if len(slot.shape) == 2} == {"q5"}
    assert plan_packing(source, "q8").notes == ("9 matrices converted from Q5_0 to q8",)
    weights = pack_weights(source, "auto", CpuOps(1))
    ops = CpuOps(1)
    for name, weight in weights.weights(ops).items():
        tensor = source.tensors[name]
        values = weight if len(tensor.shape) == 1 else ops.unpack(weight)
        assert values.tobytes() == tensor.floats(0, tensor.shape[0]).tobytes()


def test_a_packed_gguf_carries_its_vocabulary(tmp_path, home):
    source = open_model(write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0))
    again = open_model(pack_model(source, "q4", tmp_path / "packed"))
    assert again.metadata["tokenizer.ggml.model"] == "llama"
    assert list(again.metadata["tokenizer.ggml.tokens"]) == [f"t{i}" for i in range(VOCAB)]
    assert load_packed(again, "auto", CpuOps(1))[1] == ()


def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path, home):
    source = open_model(write_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match="quant must be one of auto, none, bf16, q8, q4, got 'q3'"):
        plan_packing(source, "q3")
    out = pack_model(source, "q8", tmp_path / "packed")
    with pytest.raises(ConfigError, match="is not empty; give a new directory"):
        pack_model(source, "q8", out)
    with pytest.raises(ConfigError, match="is packed already; give the original model"):
        pack_model(open_model(out), "q4", tmp_path / "twice")
    with pytest.raises(ConfigError, match="is packed already; leave --quant away"):
        load_packed(open_model(out), "q4", CpuOps(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "was packed in version 99, this bise reads 2"),
        (lambda m: m["formats"].update(norm="q9"), "unknown format 'q9'"),
        (lambda m: m["formats"].pop("norm"), "do not match its configuration"),
        (lambda m: m["config"].update(num_layers=2), "1 windows given for 2 layers"),
        (lambda m: m["config"].update(num_layers=-1), "is not a packed model of bise: num_layers"),
        (lambda m: m["config"].update(colour=1), "unknown configuration field colour"),
        (lambda m: m["formats"].update({"layers.0.w2": "q8"}), "weight layers.0.w2 has the wrong size"),
        (lambda m: m.pop("config"), "is not a packed model of bise"),
    ],
)
def test_a_packed_file_that_contradicts_itself_is_refused(tmp_path, home, change, message):
    out = pack_model(open_model(write_model(tmp_path / "model")), "q4", tmp_path / "packed")
    path = out / PACKED_FILE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["bise"])
    change(manifest)
    header["__metadata__"]["bise"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelFileError, match=message):
        open_model(out)


def write_gguf(path: Path, kind) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([1] * VOCAB)
    rng = np.random.default_rng(1)
    names = {
        "token_embd.weight": (VOCAB, DIM),
        "output.weight": (VOCAB, DIM),
        "blk.0.attn_q.weight": (64, DIM),
        "blk.0.attn_k.weight": (32, DIM),
        "blk.0.attn_v.weight": (32, DIM),
        "blk.0.attn_output.weight": (DIM, 64),
        "blk.0.ffn_gate.weight": (HIDDEN, DIM),
        "blk.0.ffn_up.weight": (HIDDEN, DIM),
        "blk.0.ffn_down.weight": (DIM, HIDDEN),
    }
    for name, shape in names.items():
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(DIM, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(tmp_path, home):
    source = open_model(write_model(tmp_path / "model"))
    path = cache_path(source, "q8")
    path.parent.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    abandoned = path.with_name(f".{path.name}.{dead.pid}.tmp")
    in_use = path.with_name(f".{path.name}.{os.getppid()}.tmp")
    abandoned.write_bytes(b"half")
    in_use.write_bytes(b"half")
    load_packed(source, "q8", CpuOps(1))
    assert path.exists()
    assert not abandoned.exists()
    assert in_use.exists()


def test_two_that_write_one_model_at_once_never_share_a_file(tmp_path, home):
    """The first is done while the second has written its header alone."""
    source = open_model(write_model(tmp_path / "model"))
    packed = pack_weights(source, "q8", CpuOps(1))
    path = tmp_path / "packed" / PACKED_FILE
    panels = [packed.memory[slot.offset :][: slot.size_bytes] for slot in packed.plan.slots]
    with PackedWriter(path, source, packed.plan.slots) as first:
        for part in panels:
            first.write(part)
        with PackedWriter(path, source, packed.plan.slots):
            first.commit()
            assert path.stat().st_size > packed.plan.size_bytes
            assert np.array_equal(read_packed(open_packed(path.parent)).memory, packed.memory)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "names", [["m[Q8].gguf"], ["m[Q8]-00001-of-00002.gguf", "m[Q8]-00002-of-00002.gguf"]]
)
def test_a_name_with_brackets_is_hashed_like_any_other(tmp_path, home, names):
    source = open_model(write_gguf(tmp_path / "plain.gguf", gguf.GGMLQuantizationType.Q8_0))
    digest = hashlib.sha256()
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(content := source.path.read_bytes() + bytes([number]))
        digest.update(content)
    found = dataclasses.replace(source, path=tmp_path / names[0])
    assert content_hash(found) == digest.hexdigest()
