"""What `open_adapter` takes and refuses; that the logits are right is in tests/equivalence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bise.config import ModelConfig
from bise.errors import ModelFileError
from bise.model.lora import BASE_HASH, CONFIG_FILE, WEIGHTS_FILE, check_base, load_adapter, open_adapter

CONFIG = ModelConfig(
    family="mistral", dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=24,
    vocab_size=32, max_context=64,
)  # fmt: skip
MIXTURE = ModelConfig(
    family="mixtral", dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=24,
    vocab_size=32, max_context=64, num_experts=4, experts_per_token=2,
)  # fmt: skip

SIZES = {"self_attn.q_proj": (32, 16), "self_attn.v_proj": (16, 16), "mlp.down_proj": (16, 24)}
RANK = 3
PREFIX = "base_model.model.model.layers."


class FloatOps:
    """A backend that keeps what it is given, every layer in one place."""

    def layer(self, index):
        return self

    def lora(self, a, b, scale):
        return a, b, scale


def tensors(rank: int = RANK) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for layer in range(CONFIG.num_layers):
        for module, (rows, columns) in SIZES.items():
            stem = f"{PREFIX}{layer}.{module}"
            found[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, columns)).astype(np.float32)
            found[f"{stem}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return found


def fields(**changes: object) -> dict[str, object]:
    targets = ["q_proj", "v_proj", "down_proj"]
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": targets, **changes}


def write(path: Path, config=None, weights=None, metadata=None) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(fields() if config is None else config))
    save_file(tensors() if weights is None else weights, path / WEIGHTS_FILE, metadata)
    return path


def test_a_sound_adapter_is_read_by_the_names_of_the_weights(tmp_path):
    file = open_adapter(write(tmp_path / "x", fields(base_model_name_or_path="me/base")), CONFIG)
    assert set(file.parts) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("wq", "wv", "w2")}
    assert (file.rank, file.base_name, file.base_sha256) == (RANK, "me/base", None)
    assert file.parts["layers.0.wq"].scale == 2
    adapter = load_adapter(file, FloatOps())
    a, b, scale = adapter.loras["layers.1.w2"]
    stored = tensors()
    assert np.array_equal(a, stored[f"{PREFIX}1.mlp.down_proj.lora_A.weight"])
    assert np.array_equal(b, stored[f"{PREFIX}1.mlp.down_proj.lora_B.weight"])
    assert (scale, adapter.sha256) == (2, file.sha256)


def test_scales_follow_rank_root_and_patterns(tmp_path):
    root = open_adapter(write(tmp_path / "root", fields(use_rslora=True)), CONFIG)
    assert root.parts["layers.0.wq"].scale == pytest.approx(6 / 3**0.5)
    weights = tensors()
    stem = f"{PREFIX}1.mlp.down_proj"
    weights[f"{stem}.lora_A.weight"] = np.zeros((5, 24), np.float32)
    weights[f"{stem}.lora_B.weight"] = np.zeros((16, 5), np.float32)
    config = fields(rank_pattern={"layers.1.mlp.down_proj": 5}, alpha_pattern={"down_proj": 20})
    file = open_adapter(write(tmp_path / "pattern", config, weights), CONFIG)
    assert [file.parts[f"layers.{layer}.w2"].scale for layer in (0, 1)] == [20 / 3, 4]


def test_the_hash_tells_adapters_apart_by_weights_and_by_settings(tmp_path):
    weights = tensors()
    weights[f"{PREFIX}0.mlp.down_proj.lora_A.weight"][0, 0] += 1
    hashes = {
        open_adapter(write(tmp_path / name, config, values), CONFIG).sha256
        for name, config, values in (
            ("a", None, None), ("b", fields(lora_alpha=7), None), ("c", None, weights), ("d", None, None),
        )
    }  # fmt: skip
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"r": 2.0}, "r"),
        ({"r": 100_000}, "r"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+b": 3}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "o_proj"]}, "target_modules"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(changes, field, tmp_path):
    with pytest.raises(ModelFileError) as caught:
        open_adapter(write(tmp_path / "x", fields(**changes)), CONFIG)
    assert caught.value.field == field
    assert CONFIG_FILE in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_ways_to_start_that_leave_the_base_alone_are_taken(init, tmp_path):
    open_adapter(write(tmp_path / "x", fields(init_lora_weights=init)), CONFIG)


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): values for name, values in tensors().items()}


def without(part: str) -> dict[str, np.ndarray]:
    return {name: values for name, values in tensors().items() if part not in name}


def replaced(end: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return {**tensors(), f"{PREFIX}0.{end}.weight": values}


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (renamed("q_proj", "qkv_proj"), "no such part"),
        (renamed("layers.1.", "layers.2."), "layer that the model does not have"),
        (renamed("lora_A.weight", "lora_A.default.weight"), "no such part"),
        (renamed("lora_B.weight", "lora_embedding_B"), "no such part"),
        (renamed("base_model.model.model.", "model."), "no such part"),
        (replaced("self_attn.q_proj.lora_magnitude_vector", np.zeros(32, np.float32)), "no such part"),
        (replaced("self_attn.q_proj.lora_A", np.zeros((3, 17), np.float32)), "expected [3, 16]"),
        (replaced("self_attn.q_proj.lora_B", np.zeros((31, 3), np.float32)), "expected [32, 3]"),
        (replaced("self_attn.q_proj.lora_A", np.zeros((4, 16), np.float32)), "expected [3, 16]"),
        (replaced("self_attn.q_proj.lora_A", np.zeros((3, 16), np.int8)), "stored as I8"),
        (replaced("self_attn.q_proj.lora_A", np.zeros((3, 16), np.float64)), "stored as F64"),
        (without("0.self_attn.q_proj.lora_B"), "has no lora_B"),
        (without("1.self_attn.q_proj"), "layer 1 has no such tensors"),
        ({**tensors(), **renamed("base_model.model.model.", "base_model.model.")}, "is there twice"),
        ({}, "holds no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_refused_with_the_reason(weights, reason, tmp_path):
    with pytest.raises(ModelFileError) as caught:
        open_adapter(write(tmp_path / "x", weights=weights), CONFIG)
    assert reason in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_weight(bad, tmp_path):
    weights = tensors()
    weights[f"{PREFIX}1.self_attn.v_proj.lora_B.weight"][2, 1] = bad
    file = open_adapter(write(tmp_path / "x", weights=weights), CONFIG)
    with pytest.raises(ModelFileError, match=r"layers\.1\.wv has a value that is NaN or infinite"):
        load_adapter(file, FloatOps())


def test_adapted_experts_are_refused_with_one_line(tmp_path):
    with pytest.raises(ModelFileError, match="mixture of experts is adapted in its attention alone"):
        open_adapter(write(tmp_path / "x"), MIXTURE)
    attention = {name: values for name, values in tensors().items() if "self_attn" in name}
    config = fields(target_modules=["q_proj", "v_proj"])
    assert len(open_adapter(write(tmp_path / "y", config, attention), MIXTURE).parts) == 4


def test_the_hash_of_another_base_model_is_refused(tmp_path):
    file = open_adapter(write(tmp_path / "x", metadata={BASE_HASH: "ab" * 32}), CONFIG)
    check_base(file, lambda: "ab" * 32)
    with pytest.raises(ModelFileError, match=r"abababababab\.\.\., this one's hash to cdcdcdcdcdcd"):
        check_base(file, lambda: "cd" * 32)
    with pytest.raises(ModelFileError, match="must be a SHA-256"):
        open_adapter(write(tmp_path / "y", metadata={BASE_HASH: "short"}), CONFIG)
    unsigned = open_adapter(write(tmp_path / "z"), CONFIG)
    check_base(unsigned, lambda: pytest.fail("there is nothing to compare"))


def test_a_pickle_a_file_and_a_link_out_of_the_directory_are_refused(tmp_path):
    path = write(tmp_path / "x")
    with pytest.raises(ModelFileError, match="an adapter is a directory"):
        open_adapter(path / WEIGHTS_FILE, CONFIG)
    with pytest.raises(ModelFileError, match="an adapter is a directory"):
        open_adapter(tmp_path, CONFIG)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (path / WEIGHTS_FILE).rename(elsewhere)
    with pytest.raises(ModelFileError, match="does not exist"):
        open_adapter(path, CONFIG)
    (path / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelFileError, match="pickle"):
        open_adapter(path, CONFIG)
    (path / WEIGHTS_FILE).symlink_to(elsewhere)
    with pytest.raises(ModelFileError, match="leads outside"):
        open_adapter(path, CONFIG)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_cleanly_or_read_soundly(data, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("x"))
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    content = bytearray((path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, min(len(content), 1500) - 1))
        content[index] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (path / name).write_bytes(content)
    try:
        file = open_adapter(path, CONFIG)
        adapter = load_adapter(file, FloatOps())
    except ModelFileError:
        return  # every other exception fails the test
    assert all(np.isfinite(a).all() and np.isfinite(b).all() for a, b, _ in adapter.loras.values())
