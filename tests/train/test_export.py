"""Whole models written for other programs: the gguf package and llama.cpp read what bise wrote."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from bise.engine.load import load_model, load_text
from bise.engine.request import Request, SamplingParams
from bise.errors import ConfigError, ModelFileError, StoreError
from bise.hub.embedded import embedded_path
from bise.kernels.dequant import dequantize
from bise.model.checkpoint import open_model
from bise.train import safetensors_writer
from bise.train.gguf_codes import encode
from bise.train.safetensors_writer import narrowed
from bise.train.whole import WholeModel
from bise.train.write import export_model

TEXT = "Once upon a time there was a little fox who"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The embedded model in every GGUF form."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for form in ("f16", "q8_0", "q4_k"):
        made[form] = folder / f"brise-{form}.gguf"
        export_model(WholeModel(open_model(embedded_path())), made[form], f"gguf-{form}")
    return made


@pytest.mark.parametrize("form", ["f16", "q8_0", "q4_k"])
def test_the_gguf_package_reads_the_weights_of_the_model(form, files):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(files[form])
    ours = open_model(files[form])
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert len(theirs) == len(ours.tensors)
    original = open_model(embedded_path())
    for name, tensor in original.tensors.items():
        rows = tensor.shape[0]
        exact = tensor.floats(0, rows)
        read = ours.tensors[name].floats(0, rows)
        bound = {"f16": 1e-3, "q8_0": 6e-3, "q4_k": 0.09}[form]
        assert np.linalg.norm(read - exact) <= bound * np.linalg.norm(exact), name
    for bise_name, gguf_name in (
        ("tok_embeddings", "token_embd.weight"),
        ("layers.2.w2", "blk.2.ffn_down.weight"),
        ("layers.3.w1", "blk.3.ffn_gate.weight"),
        ("layers.1.attn_norm", "blk.1.attn_norm.weight"),
    ):
        tensor = theirs[gguf_name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        read = ours.tensors[bise_name]
        assert np.array_equal(values.reshape(read.shape), read.floats(0, read.shape[0]))


@pytest.mark.parametrize("form", ["f16", "q8_0", "q4_k"])
def test_llama_cpp_runs_the_file_and_chooses_the_tokens_that_bise_chooses(form, files):
    llama_cpp = pytest.importorskip("llama_cpp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = llama_cpp.Llama(str(files[form]), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    try:
        ids = theirs.tokenize(TEXT.encode(), add_bos=True, special=False)
        loaded = load_model(files[form], quant="none", threaded=False)
        assert ids == [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(TEXT)]
        params = SamplingParams(max_tokens=48, temperature=0, logprobs=5)
        ours = loaded.engine.submit(Request(token_ids=tuple(ids), params=params)).result()
        loaded.close()
        chosen = []
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token == theirs.token_eos() or len(chosen) == 48:
                break
            chosen.append(token)
    finally:
        theirs.close()
    # llama.cpp rounds activations to 8 bits before products with quantised weights: near ties may turn there.
    both = list(zip(chosen, ours.token_ids, strict=False))
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
    if form == "f16":
        assert chosen == list(ours.token_ids)
    elif same < len(both):
        ranked = dict(ours.logprobs[same].top)
        assert ranked[ours.token_ids[same]] - ranked[chosen[same]] < 0.1


@pytest.mark.parametrize("text", [TEXT, "  L'été:\t12 345 €\n\n", "<s>[INST] hi", "日本語 🙂"])
def test_llama_cpp_cuts_text_as_the_model_does(text, files):
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(files["q4_k"]), vocab_only=True, verbose=False)
    tokenizer, _ = load_text(open_model(embedded_path()))
    assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    theirs.close()


def test_eight_bits_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    values = (np.random.default_rng(0).standard_normal((40, 96)) * 0.1).astype(np.float32)
    values[3] = 0
    assert np.array_equal(
        encode(values, "Q8_0", "w"), gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    )


def test_four_bits_lose_no_more_than_four_bits_must():
    rng = np.random.default_rng(1)
    for values in (
        rng.standard_normal((64, 512)),
        rng.standard_normal((64, 512)) + 3,
        np.zeros((1, 256)),
        rng.standard_normal((8, 256)) * np.logspace(-6, 3, 8)[:, None],
    ):
        x = values.astype(np.float32)
        error = np.linalg.norm(dequantize("Q4_K", encode(x, "Q4_K", "w")) - x, axis=1)
        assert (error <= 0.09 * np.linalg.norm(x - np.minimum(x.min(), 0), axis=1) + 1e-6).all()


def test_an_exported_model_is_read_again_as_the_same_model(files, tmp_path):
    source = open_model(files["f16"])
    original = open_model(embedded_path())
    for field in (
        "dim",
        "windows",
        "head_dim",
        "rope_theta",
        "norm_eps",
        "max_context",
        "tied_embeddings",
        "family",
    ):
        assert getattr(source.config, field) == getattr(original.config, field)
    tokenizer, template = load_text(source)
    mine, own = load_text(original)
    messages = [{"role": "user", "content": "Hi"}]
    assert template.encode(messages) == own.encode(messages)
    assert tokenizer.stop_ids == mine.stop_ids
    again = tmp_path / "again.gguf"
    export_model(WholeModel(source), again, "gguf-f16")
    assert open_model(again).metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]


def test_safetensors_keep_every_bit_and_every_file(tmp_path):
    out = tmp_path / "copy"
    export_model(WholeModel(open_model(embedded_path())), out, "safetensors")
    original, copy = open_model(embedded_path()), open_model(out)
    for name, tensor in original.tensors.items():
        assert np.array_equal(tensor.raw(0, tensor.shape[0]), copy.tensors[name].raw(0, tensor.shape[0]))
    assert copy.licence == original.licence == "cc-by-sa-4.0"
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.from_pretrained(out).hidden_size == original.config.dim
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(
        (embedded_path() / "tokenizer.json").read_text()
    )


def test_a_disk_that_is_full_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer, "narrowed", full)
    with pytest.raises(StoreError, match="No space left"):
        export_model(WholeModel(open_model(embedded_path())), tmp_path / "out", "safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_by_name(files, tmp_path):
    gguf = WholeModel(open_model(files["q8_0"]))
    with pytest.raises(ConfigError, match="gguf file"):
        export_model(gguf, tmp_path / "out", "safetensors")
    with pytest.raises(ConfigError, match=r"\.gguf"):
        export_model(gguf, tmp_path / "out", "gguf-f16")
    with pytest.raises(ConfigError, match="exists"):
        export_model(gguf, files["q8_0"], "gguf-f16")
    with pytest.raises(ModelFileError, match="float16"):
        narrowed(np.array([[1e6]], np.float32), "F16", "w")
    odd = tmp_path / "odd"
    shutil.copytree(embedded_path(), odd)
    document = json.loads((odd / "tokenizer.json").read_text())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    (odd / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelFileError, match="word pattern"):
        export_model(WholeModel(open_model(odd)), tmp_path / "odd.gguf", "gguf-f16")
