"""config.json of a Hugging Face directory as a `ModelConfig`: Mistral, Ministral, Mixtral and Llama.

The rule for what is not understood: a field that changes the arithmetic is refused by name, never ignored.
Known harmless fields pass; an unknown field passes only when its name says nothing about the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from bise.config import ARCHITECTURE_LIMITS, ModelConfig, RopeScaling
from bise.errors import ConfigError, ModelFileError, quoted
from bise.model.config_fields import ConfigFields
from bise.model.hf_rope import ROPE_FIELDS, rope_of

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
"""Supported `model_type` and the class that `architectures` names for it."""

_DEFAULT_WINDOWS = {"mistral": 4096, "ministral": 4096}
"""Window of a family whose config.json leaves `sliding_window` out (an explicit null means none)."""
_DEFAULT_THETAS = {"mixtral": 1e6}

_SIZES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_context",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "vocab_size": "vocab_size",
}
_QUANTISED = ("quantization_config", "quantization", "compression_config")
_USED = {
    *_SIZES,
    *ROPE_FIELDS,
    *_QUANTISED,
    "model_type", "architectures", "head_dim", "num_key_value_heads", "rms_norm_eps", "sliding_window",
    "use_sliding_window", "layer_types", "tie_word_embeddings", "hidden_act", "hidden_activation",
    "num_local_experts", "num_experts_per_tok", "torch_dtype", "dtype", "bos_token_id",
    "eos_token_id",
}  # fmt: skip

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "max_window_layers": (),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False, True),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}
"""Fields that change the arithmetic, with the values under which they do not."""

_HARMLESS = frozenset({
    # training and regularisation, inert at inference
    "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "dropout",
    "embd_pdrop", "resid_pdrop", "attn_pdrop", "classifier_dropout", "initializer_range",
    "router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "gradient_checkpointing",
    "use_reentrant",
    # how others compute the same values
    "pretraining_tp", "use_cache", "use_flash_attn", "use_flash_attention_2", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "experts_implementation", "_flash_attn_2_enabled", "cache_implementation",
    # generation defaults and outputs
    "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "begin_suppress_tokens", "suppress_tokens", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "use_bfloat16", "max_length", "min_length", "do_sample",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_beams",
    "num_beam_groups", "diversity_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "remove_invalid_values",
    "output_scores", "return_dict_in_generate", "torchscript",
    # provenance and bookkeeping
    "_name_or_path", "name_or_path", "transformers_version", "auto_map", "id2label", "label2id",
    "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "custom_pipelines", "_commit_hash", "model_max_length", "max_sequence_length", "num_labels",
    "tf_legacy_loss", "use_return_dict", "tokenizer_vocab_size",
})  # fmt: skip

_ARITHMETIC_WORDS = frozenset({
    "act", "activation", "adapter", "alibi", "altup", "attention", "attn", "audio", "bias", "cap", "capping",
    "chunk", "clip", "conv", "cross", "decay", "depth", "embedding", "embeddings", "encoder", "expert",
    "experts", "factor", "ffn", "gate", "gated", "gating", "global", "head", "heads", "hidden", "hybrid",
    "interleave", "interleaved", "kv", "latent", "layer", "layers", "linear", "local", "logit", "logits",
    "lora", "mamba", "mla", "mlp", "moe", "multimodal", "multiplier", "nope", "norm", "norms", "parallel",
    "partial", "position", "positional", "positions", "post", "pre", "q", "qk", "qkv", "query", "rank",
    "residual", "rms", "rope", "rotary", "route", "router", "routing", "scale", "scaling", "shared", "sink",
    "sinks", "skip", "softcap", "softcapping", "sparse", "sparsity", "ssm", "state", "text", "theta", "tied",
    "tower", "v", "vision", "vocab", "window", "windows", "yarn",
})  # fmt: skip
"""Words in a field's name that say that it changes the arithmetic."""


def read_hf_config(values: Mapping[str, object], origin: str) -> ModelConfig:
    """Return the architecture that config.json describes; a `ModelFileError` names `origin` and the field."""
    fields = ConfigFields(values, origin)
    family = _family(fields)
    _refuse_quantised(fields)
    fields.require_neutral(_NEUTRAL, f"is not supported for {family}: it changes what the model computes")
    refuse_unknown(fields, _USED | _NEUTRAL.keys() | _HARMLESS)
    for name in ("hidden_act", "hidden_activation"):
        if fields.text(name, "silu") not in ("silu", "swish"):
            fields.refuse(name, f"= {quoted(values[name])} is not supported; known: silu")
    sizes = {ours: fields.integer(theirs, 1, ARCHITECTURE_LIMITS[ours]) for theirs, ours in _SIZES.items()}
    heads, kv_heads, head_dim = _heads(fields, family, sizes["dim"], sizes["num_heads"])
    _check_inert(fields, sizes["vocab_size"])
    theta, scaling = rope_of(fields, _DEFAULT_THETAS.get(family, 10000.0), sizes["max_context"])
    experts, per_token = _experts(fields, family)
    return build_config(
        origin,
        family="ministral" if "layer_types" in fields and family == "mistral" else family,
        rope_scaling=scaling,
        windows=_windows(fields, family, sizes["num_layers"]),
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
        floats={"rope_theta": theta, "norm_eps": fields.number("rms_norm_eps", below=1.0)},
        integers={
            **sizes,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "num_experts": experts,
            "experts_per_token": per_token,
        },
    )


def build_config(
    origin: str,
    *,
    family: str,
    rope_scaling: RopeScaling | None,
    windows: tuple[int | None, ...],
    tied_embeddings: bool,
    floats: Mapping[str, float],
    integers: Mapping[str, int],
) -> ModelConfig:
    """Return the `ModelConfig`; what it finds wrong is raised as a `ModelFileError` that names `origin`."""
    try:
        return ModelConfig(
            family=family,
            dim=integers["dim"],
            num_layers=integers["num_layers"],
            num_heads=integers["num_heads"],
            num_kv_heads=integers["num_kv_heads"],
            head_dim=integers["head_dim"],
            hidden_dim=integers["hidden_dim"],
            vocab_size=integers["vocab_size"],
            max_context=integers["max_context"],
            rope_theta=floats["rope_theta"],
            rope_scaling=rope_scaling,
            norm_eps=floats["norm_eps"],
            windows=windows,
            num_experts=integers["num_experts"],
            experts_per_token=integers["experts_per_token"],
            tied_embeddings=tied_embeddings,
        )
    except ConfigError as error:
        raise ModelFileError(f"{origin}: {error}", field=error.field) from error


def refuse_unknown(fields: ConfigFields, known: set[str] | frozenset[str]) -> None:
    """Refuse an unknown field that is set and whose name speaks of the arithmetic; others pass."""
    for name, value in fields.values.items():
        if name in known or value is None or value is False:
            continue
        words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
        if _ARITHMETIC_WORDS.intersection(words):
            fields.refuse(
                name, f"= {quoted(value)} is not known to bise and may change what the model computes"
            )


def _family(fields: ConfigFields) -> str:
    known = ", ".join(sorted(ARCHITECTURES))
    family = fields.text("model_type")
    if family not in ARCHITECTURES:
        hint = ""
        if "text_config" in fields:
            hint = "; it has parts besides the text model: use a text-only export or a GGUF file of it"
        fields.refuse("model_type", f"= {quoted(family)} is not supported; known: {known}{hint}")
    if "architectures" in fields:
        names = fields.items("architectures")
        accepted = [[name] for kind, name in ARCHITECTURES.items() if _same_network(kind, family)]
        if names and names not in accepted:
            fields.refuse(
                "architectures",
                f"= {quoted(names)} is not supported for {family}; known: {ARCHITECTURES[family]}",
            )
    return family


def _same_network(kind: str, family: str) -> bool:
    """Mistral and Ministral differ in the window alone, which the fields tell."""
    return kind == family or {kind, family} == {"mistral", "ministral"}


def _refuse_quantised(fields: ConfigFields) -> None:
    for name in _QUANTISED:
        if name not in fields:
            continue
        method = fields.nested(name).text("quant_method", "unknown")
        fields.refuse(
            name,
            f"says that the weights are quantised ({quoted(method)}), which bise does not read; "
            "use the unquantised model (bise quantises it on load) or a GGUF file",
        )


def _check_inert(fields: ConfigFields, vocab_size: int) -> None:
    """Check what has no part in the arithmetic but shows a damaged file."""
    for name in ("torch_dtype", "dtype"):
        fields.text(name, "")
    for name in ("bos_token_id", "eos_token_id"):
        value = fields.values.get(name)
        tokens = cast(list[object], value) if isinstance(value, list) else [value]
        for token in tokens:
            if token is not None and not (type(token) is int and 0 <= token < vocab_size):
                fields.refuse(name, f"= {quoted(token)} is not a token id below vocab_size = {vocab_size}")


def _heads(fields: ConfigFields, family: str, dim: int, heads: int) -> tuple[int, int, int]:
    """Return (heads, kv heads, head width)."""
    # Llama 1 files predate the field; null means the same everywhere.
    absent_means_heads = family == "llama" or "num_key_value_heads" in fields.values
    limit = ARCHITECTURE_LIMITS["num_kv_heads"]
    kv_heads = fields.integer("num_key_value_heads", 1, limit, heads if absent_means_heads else None)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"= {kv_heads} does not divide num_attention_heads = {heads}")
    if "head_dim" in fields:
        head_dim = fields.integer("head_dim", 1, ARCHITECTURE_LIMITS["head_dim"])
    elif dim % heads:
        fields.refuse(
            "num_attention_heads", f"= {heads} does not divide hidden_size = {dim}, and head_dim is absent"
        )
    else:
        head_dim = dim // heads
    if head_dim % 2:
        fields.refuse("head_dim", f"= {head_dim} must be even for rotary embedding")
    return heads, kv_heads, head_dim


def _experts(fields: ConfigFields, family: str) -> tuple[int, int]:
    if family != "mixtral":
        fields.require_neutral(
            {"num_local_experts": (), "num_experts_per_tok": ()},
            f"is not supported for {family} (model_type)",
        )
        return 0, 0
    experts = fields.integer("num_local_experts", 1, ARCHITECTURE_LIMITS["num_experts"])
    return experts, fields.integer("num_experts_per_tok", 1, experts)


def _windows(fields: ConfigFields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer, with the semantics of the reference implementation of the family."""
    window = None
    if "sliding_window" in fields:
        window = fields.integer("sliding_window", 1, ARCHITECTURE_LIMITS["max_context"])
    elif "sliding_window" not in fields.values:
        window = _DEFAULT_WINDOWS.get(family)
    if window is not None and not fields.boolean("use_sliding_window", True):
        fields.refuse(
            "use_sliding_window", f"is false but sliding_window is {window}; set sliding_window to null"
        )
    if family == "llama" and window is not None:
        fields.refuse("sliding_window", f"= {window} is not supported for llama")
    if "layer_types" not in fields:
        return (window,) * num_layers
    kinds = fields.items("layer_types")
    if len(kinds) != num_layers:
        fields.refuse("layer_types", f"has {len(kinds)} entries for num_hidden_layers = {num_layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"has {quoted(kind)}; known: full_attention, sliding_attention")
    if window is None and "sliding_attention" in kinds:
        fields.refuse("sliding_window", "is missing, but layer_types has sliding_attention")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family in ("llama", "mixtral") and windows != (window,) * num_layers:
        fields.refuse("layer_types", f"mixes kinds of attention, which is not supported for {family}")
    return windows
