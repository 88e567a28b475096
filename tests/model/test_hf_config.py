"""config.json of published models and of their variants."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bise.config import ModelConfig, RopeScaling
from bise.errors import ModelFileError
from bise.model.hf_config import read_hf_config

MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
NEMO = MISTRAL_7B_V01 | {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
MIXTRAL = MISTRAL_7B_V01 | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_32_1B = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def read(values: dict[str, Any], **changes: Any) -> ModelConfig:
    return read_hf_config(values | changes, "config.json")


def test_mistral_7b_v01_has_a_window_in_every_layer_and_seven_billion_parameters() -> None:
    config = read(MISTRAL_7B_V01)
    assert config.windows == (4096,) * 32
    assert (config.head_dim, config.num_kv_heads, config.max_context) == (128, 8, 32768)
    assert config.num_params == 7_241_732_096


def test_nemo_keeps_a_head_width_that_is_not_derived() -> None:
    config = read(NEMO)
    assert (config.dim, config.num_heads, config.head_dim, config.q_dim) == (5120, 32, 128, 4096)
    assert config.windows == (None,) * 40


def test_mixtral_8x7b_counts_all_and_active_parameters() -> None:
    config = read(MIXTRAL)
    assert (config.num_experts, config.experts_per_token, config.is_moe) == (8, 2, True)
    assert config.num_params == 46_702_792_704
    assert config.num_active_params == 12_879_925_248


def test_llama_2_without_key_value_heads_uses_as_many_as_heads() -> None:
    assert read(LLAMA_2).num_kv_heads == 32


def test_llama_3_scaling_is_read_with_every_factor() -> None:
    config = read(LLAMA_32_1B)
    assert config.tied_embeddings
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=32.0, original_context=8192)


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 77}, 77),
        ("mistral", {}, 4096),
        ("mixtral", {}, None),
        ("mixtral", {"sliding_window": 77}, 77),
        ("ministral", {}, 4096),
        ("ministral", {"sliding_window": None}, None),
        ("llama", {}, None),
    ],
)
def test_window_follows_the_reference_of_its_family(
    family: str, changes: dict[str, Any], window: int | None
) -> None:
    base = {**MIXTRAL} if family == "mixtral" else {**MISTRAL_7B_V01}
    base |= {"model_type": family, "architectures": None}
    del base["sliding_window"]
    assert read(base, **changes).windows == (window,) * 32


def test_layer_types_choose_the_window_of_each_layer() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 8
    config = read(MISTRAL_7B_V01, layer_types=kinds)
    assert config.family == "ministral"
    assert config.windows == (None, 4096, 4096, 4096) * 8
    assert config.window_groups == (None, 4096)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_scaling_is_read_under_old_and_new_names(key: str, kind: str) -> None:
    config = read(LLAMA_2, **{key: {kind: "linear", "factor": 4}})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_theta_may_stand_in_rope_parameters() -> None:
    values = {key: value for key, value in MISTRAL_7B_V01.items() if key != "rope_theta"}
    assert read(values, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5


def test_yarn_without_an_original_context_takes_the_models() -> None:
    scaling = read(LLAMA_2, rope_scaling={"rope_type": "yarn", "factor": 4.0}).rope_scaling
    assert scaling is not None
    assert scaling.original_context == 4096
    assert scaling.attention_factor is None


def test_yarn_mscales_make_a_ratio() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = read(LLAMA_2, rope_scaling=rope).rope_scaling
    assert scaling is not None
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-15)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ModelFileError, match=r"'qwen2' is not supported; known: llama, ministral, mistral, mixtral"
    ):
        read(MISTRAL_7B_V01, model_type="qwen2")


def test_a_quantised_checkpoint_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelFileError, match=r"'awq'.*unquantised model .* or a GGUF file"):
        read(MISTRAL_7B_V01, quantization_config={"quant_method": "awq", "bits": 4})


@pytest.mark.parametrize(
    "name", ["attn_temperature_tuning", "some_new_scale", "newNormKind", "extra_experts"]
)
def test_an_unknown_field_that_speaks_of_the_arithmetic_is_refused(name: str) -> None:
    with pytest.raises(ModelFileError, match=name):
        read(MISTRAL_7B_V01, **{name: 1})


@pytest.mark.parametrize("name", ["unsloth_fixed", "mergekit_version", "my_company"])
def test_an_unknown_field_of_bookkeeping_is_accepted(name: str) -> None:
    assert read(MISTRAL_7B_V01, **{name: "x"}) == read(MISTRAL_7B_V01)
