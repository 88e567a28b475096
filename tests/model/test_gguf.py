"""GGUF files written by the gguf package are read as the same numbers and the same network."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bise.config import ModelConfig
from bise.errors import ModelFileError
from bise.formats import FORMATS
from bise.model.checkpoint import open_model
from bise.model.gguf import open_gguf, paired_rows
from bise.model.rope import rope_frequencies
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes

gguf = pytest.importorskip("gguf")

sys.path.insert(0, str(Path(__file__).parent))
files = importlib.import_module("gguf_files")
Spec, stored, write, yarn_keys = files.Spec, files.stored, files.write, files.yarn_keys


def reference(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor as the gguf package reads and dequantises it."""
    result = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        data = (
            np.array(tensor.data)
            .view(np.uint8)
            .reshape(-1, tensor.n_bytes // (int(np.prod(shape)) // shape[-1]))
        )
        result[tensor.name] = gguf.quants.dequantize(data, tensor.tensor_type).reshape(shape)
    return result


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Return projection rows with each head's interleaved pairs put back into two halves."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def check_against_reference(source: ModelSource, path: Path, spec: Spec) -> None:
    """Assert that every weight of the source equals the gguf package's, bit for bit."""
    expected = reference(path)
    names = {"attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output"}
    names |= {
        "ffn_norm": "ffn_norm",
        "router": "ffn_gate_inp",
        "w1": "ffn_gate",
        "w2": "ffn_down",
        "w3": "ffn_up",
    }
    tops = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    assert list(source.tensors) == list(weight_shapes(source.config))
    for name, tensor in source.tensors.items():
        parts = name.split(".")
        if len(parts) == 1:
            want = expected[f"{tops[name]}.weight"]
        elif len(parts) == 5 and spec.stacked:
            want = expected[f"blk.{parts[1]}.{names[parts[4]]}_exps.weight"][int(parts[3])]
        elif len(parts) == 5:
            want = expected[f"blk.{parts[1]}.{names[parts[4]]}.{parts[3]}.weight"]
        else:
            want = expected[f"blk.{parts[1]}.{names[parts[2]]}.weight"]
        if parts[-1] in ("wq", "wk"):
            want = halves(want, spec.head_dim)
        assert tensor.shape == want.shape
        whole = tensor.floats(0, tensor.shape[0])
        assert whole.dtype == np.float32
        assert whole.tobytes() == np.ascontiguousarray(want).tobytes(), name
        for start, stop in ((0, 0), (1, 2), (3, tensor.shape[0]), (5, 39)):
            if stop <= tensor.shape[0]:
                assert tensor.floats(start, stop).tobytes() == whole[start:stop].tobytes(), name
                assert len(tensor.raw(start, stop)) == stop - start


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_of_every_type_equal_the_gguf_packages(tmp_path: Path, kind: str) -> None:
    width = 256 if FORMATS[kind].block_length == 256 else 64
    spec = Spec(dim=width, heads=4, head_dim=width // 4, hidden=width, types={"": kind}, layers=1)
    path = tmp_path / "m.gguf"
    write(path, spec)
    source = open_gguf(path)
    assert source.tensors["layers.0.wq"].format == kind
    assert source.tensors["layers.0.wq"].size_bytes == width * FORMATS[kind].row_bytes(width)
    check_against_reference(source, path, spec)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_taken_from_stacked_and_from_single_tensors(tmp_path: Path, stacked: bool) -> None:
    spec = Spec(
        experts=4, stacked=stacked, types={"ffn_down": "Q8_0", "ffn_gate.": "Q4_0", "ffn_gate_exps": "Q4_0"}
    )
    path = tmp_path / "m.gguf"
    write(path, spec)
    source = open_gguf(path)
    assert (source.config.family, source.config.num_experts, source.config.experts_per_token) == (
        "mixtral",
        4,
        2,
    )
    assert source.tensors["layers.1.experts.3.w2"].format == "Q8_0"
    check_against_reference(source, path, spec)


def test_a_file_without_output_weight_has_tied_embeddings(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(tied=True))
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config.tied_embeddings
    assert "output" not in source.tensors


def test_header_fields_become_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, Spec())
    source = open_gguf(path)
    assert source.config == ModelConfig(
        family="mistral",
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        hidden_dim=96,
        vocab_size=80,
        max_context=256,
        norm_eps=1e-5,
    )
    assert (source.kind, source.path, source.name, source.licence) == (
        "gguf",
        path,
        "Tiny Mistral",
        "apache-2.0",
    )
    assert source.metadata["llama.block_count"] == 2


def test_head_width_is_derived_only_where_it_is_not_given(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(head_dim=16))
    assert open_gguf(tmp_path / "m.gguf").config.head_dim == 16
    write(tmp_path / "n.gguf", Spec(head_dim=48))
    assert open_gguf(tmp_path / "n.gguf").config.head_dim == 48


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, (7, 7, 7, 7, 7)),
        (0, (7, 7, 7, 7, 7)),
        (1, (None,) * 5),
        (2, (7, None, 7, None, 7)),
        (4, (7, 7, 7, None, 7)),
        ([False, True, True, False, True], (None, 7, 7, None, 7)),
    ],
)
def test_the_sliding_window_and_its_pattern_are_honoured(
    tmp_path: Path, pattern: object, windows: tuple
) -> None:
    def keys(writer) -> None:
        writer.add_sliding_window(7)
        if pattern is not None:
            writer.add_sliding_window_pattern(pattern)

    write(tmp_path / "m.gguf", Spec(layers=5, keys=keys))
    assert open_gguf(tmp_path / "m.gguf").config.windows == windows


def test_a_window_of_zero_means_full_attention(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(keys=lambda writer: writer.add_sliding_window(0)))
    assert open_gguf(tmp_path / "m.gguf").config.windows == (None, None)


def test_yarn_keys_become_yarn_scaling_with_its_usual_magnitude(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(keys=yarn_keys))
    config = open_gguf(tmp_path / "m.gguf").config
    scaling = config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("yarn", 4.0, 64)
    assert (scaling.beta_fast, scaling.beta_slow, config.rope_theta) == (16.0, 1.0, 1e6)
    usual = replace(config, rope_scaling=replace(scaling, attention_factor=None))
    assert rope_frequencies(config)[1] == rope_frequencies(usual)[1]


@pytest.mark.parametrize(
    ("key", "value", "magnitude"),
    [
        ("yarn_log_multiplier", 1.0, 1.0),
        ("yarn_attn_factor", 1.25, 1.25),
        ("attn_factor", 2.0, 2 * 1.1386294361119891),
    ],
)
def test_yarn_magnitude_keys_are_honoured(tmp_path: Path, key: str, value: float, magnitude: float) -> None:
    def keys(writer) -> None:
        yarn_keys(writer)
        writer.add_float32(f"mistral3.rope.scaling.{key}", value)

    write(tmp_path / "m.gguf", Spec(arch="mistral3", keys=keys))
    config = open_gguf(tmp_path / "m.gguf").config
    assert config.family == "mistral"
    assert rope_frequencies(config)[1] == pytest.approx(magnitude, rel=1e-12)


def test_linear_scaling_is_honoured_and_a_factor_of_one_is_none(tmp_path: Path) -> None:
    def keys(writer) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    write(tmp_path / "m.gguf", Spec(keys=keys))
    scaling = open_gguf(tmp_path / "m.gguf").config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)
    write(tmp_path / "n.gguf", Spec(keys=lambda writer: writer.add_rope_scaling_factor(1.0)))
    assert open_gguf(tmp_path / "n.gguf").config.rope_scaling is None


def test_the_rope_freqs_tensor_divides_the_frequencies(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 16).astype(np.float32)
    write(tmp_path / "m.gguf", Spec(rope_factors=factors))
    config = open_gguf(tmp_path / "m.gguf").config
    plain = rope_frequencies(replace(config, rope_scaling=None))[0]
    np.testing.assert_array_equal(rope_frequencies(config)[0], plain / factors.astype(np.float64))


def test_a_split_model_is_read_through_its_first_part(tmp_path: Path) -> None:
    spec = Spec(types={"ffn": "Q8_0"})
    write(tmp_path / "whole.gguf", spec)
    write(tmp_path / "m.gguf", spec, split_max_tensors=6)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 4
    whole, split = open_gguf(tmp_path / "whole.gguf"), open_gguf(parts[0])
    assert split.config == whole.config
    for name, tensor in whole.tensors.items():
        assert (
            split.tensors[name].raw(0, tensor.shape[0]).tobytes() == tensor.raw(0, tensor.shape[0]).tobytes()
        )


def test_a_directory_with_the_parts_of_one_split_model_opens(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(), split_max_tensors=6)
    assert open_model(tmp_path).config.num_layers == 2
    write(tmp_path / "other.gguf", Spec())
    with pytest.raises(ModelFileError, match=r"has 5 \.gguf files; give the path of one of them"):
        open_model(tmp_path)


def test_a_split_model_is_refused_when_a_part_is_missing_swapped_or_opened_alone(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(), split_max_tensors=6)
    first, second, third, last = sorted(tmp_path.glob("m-*.gguf"))
    with pytest.raises(ModelFileError, match=r"open m-00001-of-00004\.gguf"):
        open_gguf(second)
    kept = third.read_bytes()
    third.write_bytes(last.read_bytes())
    with pytest.raises(ModelFileError, match=r"00003-of-00004\.gguf: split\.no is 3, not 2"):
        open_gguf(first)
    third.unlink()
    with pytest.raises(ModelFileError, match=r"00003-of-00004\.gguf' does not exist"):
        open_gguf(first)
    third.write_bytes(kept)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelFileError, match=r"renamed\.gguf: split\.count is 4"):
        open_gguf(tmp_path / "renamed.gguf")


def test_the_default_width_is_the_one_most_layer_bytes_have(tmp_path: Path) -> None:
    for kind, width in (("Q4_0", "q4"), ("Q5_0", "q8"), ("Q4_K", "q4"), ("Q8_0", "q8"), ("F16", "q8")):
        write(tmp_path / "m.gguf", Spec(dim=256, head_dim=64, hidden=256, types={"blk": kind}))
        assert open_gguf(tmp_path / "m.gguf").default_quant == width


def test_vocabulary_arrays_are_plain_lists_and_numpy_arrays(tmp_path: Path) -> None:
    def keys(writer) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}é" for i in range(80)])
        writer.add_token_scores([-float(i) for i in range(80)])
        writer.add_token_types([1] * 80)
        writer.add_add_bos_token(True)

    write(tmp_path / "m.gguf", Spec(keys=keys))
    metadata = open_gguf(tmp_path / "m.gguf").metadata
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, list)
    assert tokens[3] == "t3é"
    assert isinstance(scores, np.ndarray)
    assert (scores.dtype, scores[3]) == (np.float32, -3.0)
    assert metadata["tokenizer.ggml.token_type"].tolist() == [1] * 80
    assert metadata["tokenizer.ggml.add_bos_token"] is True


def test_nested_arrays_are_plain_lists(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec(keys=lambda writer: writer.add_array("general.x", [[1, 2], [3]])))
    assert open_gguf(tmp_path / "m.gguf").metadata["general.x"] == [[1, 2], [3]]


def test_a_large_vocabulary_is_read_in_under_a_second_of_processor_time(tmp_path: Path, quickest) -> None:
    count = 131072

    def keys(writer) -> None:
        writer.add_token_list([f"tök{i:x}" for i in range(count)])
        writer.add_token_scores([0.0] * count)
        writer.add_token_merges([f"a{i:x} b{i:x}" for i in range(2 * count)])

    write(
        tmp_path / "m.gguf", Spec(vocab=count, dim=32, head_dim=8, hidden=32, layers=1, tied=True, keys=keys)
    )
    assert len(open_gguf(tmp_path / "m.gguf").metadata["tokenizer.ggml.merges"]) == 2 * count
    assert quickest(lambda: open_gguf(tmp_path / "m.gguf"), 1.0) < 1.0


def test_a_file_cut_after_opening_gives_an_error_when_its_rows_are_read(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec())
    source = open_gguf(tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", 20000)
    with pytest.raises(ModelFileError, match="cut or replaced"):
        source.tensors["output"].floats(0, 80)


def test_rows_outside_a_tensor_are_a_programming_error(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Spec())
    tensor = open_gguf(tmp_path / "m.gguf").tensors["layers.0.wq"]
    with pytest.raises(ValueError, match="not inside"):
        tensor.raw(0, 129)


def test_paired_rows_put_the_two_halves_of_each_head_side_by_side() -> None:
    assert paired_rows(0, 8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert paired_rows(5, 7, 4).tolist() == [6, 5]
