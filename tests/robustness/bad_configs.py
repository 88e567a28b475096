"""config.json and params.json that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sound_models import (
    DELETE,
    Case,
    base_config,
    base_params,
    write_config,
    write_model,
    write_native,
)


def _config(name: str, mentions: str, **changes: Any) -> Case:
    return Case("cfg_" + name, lambda directory: write_model(directory, changes), mentions)


def _config_text(name: str, text: bytes, mentions: str = "config.json") -> Case:
    def build(directory: Path) -> None:
        write_model(directory)
        write_config(directory, text=text)

    return Case("cfg_" + name, build, mentions)


_SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_BAD_SIZES: dict[str, Any] = {
    "zero": 0,
    "negative": -4,
    "float": 4.0,
    "text": "4",
    "true": True,
    "array": [4],
    "huge": 10**30,
}

CONFIG = [
    *(
        _config(f"{field}_{label}", field, **{field: value})
        for field in _SIZE_FIELDS
        for label, value in _BAD_SIZES.items()
    ),
    *(
        _config(f"{field}_absent", field, **{field: DELETE})
        for field in (*_SIZE_FIELDS, "rms_norm_eps", "model_type")
        if field != "head_dim"
    ),
    *(
        _config(f"{field}_{label}", field, **{field: value})
        for field in ("rms_norm_eps", "rope_theta")
        for label, value in {
            "zero": 0,
            "negative": -1.0,
            "text": "1e-5",
            "true": True,
            "huge": 10**39,
        }.items()
    ),
    _config("eps_one", "norm_eps", rms_norm_eps=1.5),
    _config("theta_one", "rope_theta", rope_theta=1.0),
    _config("one_layer_too_few", "config.json", num_hidden_layers=1),
    _config("one_layer_too_many", "config.json", num_hidden_layers=3),
    _config("a_thousand_layers", "config.json", num_hidden_layers=1000),
    _config("vocab_other", "model.embed_tokens.weight", vocab_size=33),
    _config("hidden_other", "config.json", hidden_size=32),
    _config("intermediate_other", "mlp", intermediate_size=25),
    _config("heads_not_divisible", "num_key_value_heads", num_key_value_heads=3),
    _config("head_dim_odd", "head_dim", head_dim=5),
    _config("head_dim_other", "q_proj", head_dim=8),
    _config("head_dim_underivable", "num_attention_heads", head_dim=DELETE, hidden_size=18),
    _config("kv_heads_other", "k_proj", num_key_value_heads=4),
    _config("window_zero", "sliding_window", sliding_window=0),
    _config("window_negative", "sliding_window", sliding_window=-1),
    _config("window_float", "sliding_window", sliding_window=8.0),
    _config("window_true", "sliding_window", sliding_window=True),
    _config("window_unused", "use_sliding_window", sliding_window=8, use_sliding_window=False),
    _config("window_for_llama", "sliding_window", model_type="llama", architectures=DELETE, sliding_window=8),
    _config("layer_types_short", "layer_types", layer_types=["full_attention"]),
    _config("layer_types_unknown", "layer_types", layer_types=["full_attention", "chunked_attention"]),
    _config("layer_types_number", "layer_types", layer_types=[1, 2]),
    _config("layer_types_text", "layer_types", layer_types="full_attention"),
    _config("layer_types_without_window", "sliding_window", layer_types=["sliding_attention"] * 2),
    _config("family_unknown", "model_type", model_type="gpt2"),
    _config("family_number", "model_type", model_type=7),
    _config("family_multimodal", "model_type", model_type="mistral3", text_config={}),
    _config("family_with_escape", "model_type", model_type="\x1b[31mred"),
    _config("class_unknown", "architectures", architectures=["MistralForSequenceClassification"]),
    _config("class_of_another_family", "architectures", architectures=["MixtralForCausalLM"]),
    _config("classes_two", "architectures", architectures=["MistralForCausalLM", "LlamaForCausalLM"]),
    _config("class_text", "architectures", architectures="MistralForCausalLM"),
    _config(
        "auto_map_of_unknown",
        "model_type",
        model_type="mine",
        auto_map={"AutoConfig": "configuration_mine.C"},
    ),
    _config("activation", "hidden_act", hidden_act="gelu"),
    _config("activation_number", "hidden_act", hidden_act=1),
    _config("tied_text", "tie_word_embeddings", tie_word_embeddings="false"),
    _config("tied_number", "tie_word_embeddings", tie_word_embeddings=0),
    _config("quantised_gptq", "quantization_config", quantization_config={"quant_method": "gptq", "bits": 4}),
    _config("quantised_fp8", "quantization_config", quantization_config={"quant_method": "fp8"}),
    _config("quantised_nameless", "quantization_config", quantization_config={"bits": 4}),
    _config("quantised_mlx", "quantization", quantization={"group_size": 64, "bits": 4}),
    _config("quantised_text", "quantization_config", quantization_config="awq"),
    _config("eos_beyond_vocab", "eos_token_id", eos_token_id=32),
    _config("eos_list_beyond_vocab", "eos_token_id", eos_token_id=[2, 99]),
    _config("bos_negative", "bos_token_id", bos_token_id=-1),
    _config("bos_text", "bos_token_id", bos_token_id="1"),
    _config("dtype_number", "torch_dtype", torch_dtype=16),
    *(
        _config(f"arithmetic_{field}", field, **{field: value})
        for field, value in {
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.5,
            "logit_scale": 0.25,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "partial_rotary_factor": 0.5,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "qk_norm": True,
            "clip_qkv": 8.0,
            "query_pre_attn_scalar": 256,
            "num_local_experts": 8,
            "is_encoder_decoder": True,
            "rope_local_base_freq": 1e4,
            "head_scale": 2.0,
            "alibi": True,
            "useAttentionSinks": 4,
            "mamba_d_state": 16,
        }.items()
    ),
    *(
        _config(f"rope_{label}", mentions, rope_scaling=value)
        for label, mentions, value in (
            ("text", "rope_scaling", "linear"),
            ("array", "rope_scaling", [1]),
            ("unknown", "type", {"type": "dynamic", "factor": 2.0}),
            ("longrope", "rope_type", {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}),
            ("kind_number", "rope_type", {"rope_type": 3, "factor": 2.0}),
            ("no_kind", "factor", {"factor": 2.0}),
            ("two_kinds", "type", {"rope_type": "linear", "type": "yarn", "factor": 2.0}),
            ("linear_no_factor", "factor", {"type": "linear"}),
            ("linear_below_one", "factor", {"type": "linear", "factor": 0.5}),
            ("linear_text", "factor", {"type": "linear", "factor": "2"}),
            ("linear_true", "factor", {"type": "linear", "factor": True}),
            ("linear_negative", "factor", {"type": "linear", "factor": -2.0}),
            ("more_fields", "finetuned", {"type": "linear", "factor": 2.0, "finetuned": True}),
            ("theta_twice", "rope_theta", {"type": "linear", "factor": 2.0, "rope_theta": 5e5}),
            ("partial", "partial_rotary_factor", {"rope_type": "default", "partial_rotary_factor": 0.5}),
            (
                "llama3_no_low",
                "low_freq_factor",
                {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0},
            ),
            (
                "llama3_reversed",
                "high_freq_factor",
                {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            ),
            (
                "yarn_original_zero",
                "original_max_position_embeddings",
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
            ),
            (
                "yarn_reversed",
                "beta_fast",
                {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32},
            ),
            ("yarn_not_truncated", "truncate", {"rope_type": "yarn", "factor": 4.0, "truncate": False}),
            (
                "yarn_llama4",
                "llama_4_scaling_beta",
                {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1},
            ),
        )
    ),
    _config(
        "rope_said_twice",
        "rope_scaling",
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "linear", "factor": 4.0},
    ),
    _config_text("empty", b""),
    _config_text("cut", b'{"model_type": "mistral", "hidden'),
    _config_text("array", b"[]"),
    _config_text("number", b"1"),
    _config_text("binary", bytes(range(256))),
    _config_text("byte_order_mark", b"\xef\xbb\xbf{}"),
    _config_text(
        "duplicate_key", json.dumps(base_config()).encode()[:-1] + b', "hidden_size": 16}', "hidden_size"
    ),
    _config_text("deep", b'{"a":' + b"[" * 200_000),
    _config_text("deep_closed", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    _config_text("long_number", json.dumps(base_config()).encode()[:-1] + b', "a": ' + b"1" * 20_000 + b"}"),
    _config_text("long_float", json.dumps(base_config()).encode()[:-1] + b', "a": 1.' + b"1" * 20_000 + b"}"),
    _config_text("nan", json.dumps(base_config() | {"rms_norm_eps": float("nan")}).encode()),
    _config_text("infinity", json.dumps(base_config() | {"rope_theta": float("inf")}).encode()),
    _config_text("overflow", json.dumps(base_config()).encode()[:-1] + b', "rope": 1e999}'),
    _config_text("nine_megabytes", json.dumps(base_config()).encode()[:-1] + b" " * 9_000_000 + b"}"),
    _config_text("surrogate", json.dumps(base_config() | {"_name_or_path": "\ud800"}).encode()),
]


def _native(name: str, mentions: str, **changes: Any) -> Case:
    return Case("mi_" + name, lambda directory: write_native(directory, changes), mentions)


NATIVE = [
    *(
        _native(f"{field}_absent", field, **{field: DELETE})
        for field in base_params()
        if field != "rope_theta"
    ),
    *(_native(f"{field}_text", field, **{field: "4"}) for field in base_params()),
    _native("head_dim_odd", "head_dim", head_dim=3),
    _native("kv_heads", "n_kv_heads", n_kv_heads=3),
    _native("window_text", "sliding_window", sliding_window="4096"),
    _native("window_zero", "sliding_window", sliding_window=0),
    _native("window_empty_list", "sliding_window", sliding_window=[]),
    _native("window_pattern_of_three", "sliding_window", sliding_window=[None, 4, 4]),
    _native("window_pattern_text", "sliding_window", sliding_window=[None, "4"]),
    _native("window_pattern_true", "sliding_window", sliding_window=[None, True]),
    _native("window_twice", "_sliding_window", sliding_window=4, _sliding_window=[None, 4]),
    _native("moe_number", "moe", moe=8),
    _native("moe_half", "num_experts_per_tok", moe={"num_experts": 8}),
    _native("moe_too_many", "num_experts_per_tok", moe={"num_experts": 2, "num_experts_per_tok": 3}),
    _native(
        "moe_shared",
        "num_shared_experts",
        moe={"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 1},
    ),
    _native("moe_on_dense", "params.json", moe={"num_experts": 2, "num_experts_per_tok": 1}),
    _native("quantised", "quantization", quantization={"qformat_weight": "fp8_e4m3"}),
    _native("vision", "vision_encoder", vision_encoder={"hidden_size": 4}),
    _native("llama4", "llama_4_scaling", llama_4_scaling={"beta": 0.1}),
    _native("biases", "use_biases", use_biases=True),
    _native("mamba", "model_type", model_type="mamba"),
    _native("latent", "kv_lora_rank", kv_lora_rank=512),
    _native("lora", "lora", lora={"rank": 4}),
    _native("yarn_more", "gamma", yarn={"factor": 2, "original_max_position_embeddings": 64, "gamma": 1}),
    _native("yarn_without_context", "original_max_position_embeddings", yarn={"factor": 2}),
    _native("layers", "layers", n_layers=3),
]
