"""params.json of Mistral's own releases as a `ModelConfig`.

Defaults are those of mistral-inference (`args.py`, `transformer.py`): no rope_theta means 10^4 with a window
and 10^6 without; no context length means 128,000 positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from bise.config import ARCHITECTURE_LIMITS, ModelConfig, RopeScaling
from bise.errors import ConfigError, ModelFileError, quoted
from bise.model.config_fields import ConfigFields
from bise.model.hf_config import build_config, refuse_unknown

DEFAULT_CONTEXT = 128_000

_SIZES = {
    "dim": "dim",
    "hidden_dim": "hidden_dim",
    "head_dim": "head_dim",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "n_layers": "num_layers",
    "vocab_size": "vocab_size",
}
_USED = {
    *_SIZES, "norm_eps", "rope_theta", "sliding_window", "_sliding_window", "moe", "yarn", "max_seq_len",
    "max_position_embeddings", "tied_embeddings", "activation", "model_type", "quantization",
}  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_biases": (False,),
    "causal": (True,),
    "lora": (),
    "llama_4_scaling": (),
    "vision_encoder": (),
    "multimodal": (),
    "rope_scaling": (),
    "use_scaled_rope": (False,),
    "ffn_dim_multiplier": (),
}
_HARMLESS = frozenset({
    "max_batch_size", "multiple_of", "dtype", "ragged_attention", "fused_rms_norm", "model_parallel",
    "is_sequence_parallel", "efficient_attn", "dropout", "use_cache", "init", "checkpoint", "softmax_fp32",
})  # fmt: skip


def read_mistral_params(values: Mapping[str, object], origin: str) -> ModelConfig:
    """Return the architecture of params.json; raises `ModelFileError` naming `origin` and the field."""
    fields = ConfigFields(values, origin)
    if fields.text("model_type", "transformer") != "transformer":
        fields.refuse("model_type", f"= {quoted(values['model_type'])} is not supported; known: transformer")
    if "quantization" in fields:
        fields.refuse(
            "quantization",
            "says that the weights are quantised, which bise does not read; "
            "use the unquantised model (bise quantises it on load) or a GGUF file",
        )
    fields.require_neutral(_NEUTRAL, "is not supported: it changes what the model computes")
    refuse_unknown(fields, _USED | _NEUTRAL.keys() | _HARMLESS)
    if fields.text("activation", "silu") != "silu":
        fields.refuse("activation", f"= {quoted(values['activation'])} is not supported; known: silu")
    sizes = {ours: fields.integer(theirs, 1, ARCHITECTURE_LIMITS[ours]) for theirs, ours in _SIZES.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        fields.refuse(
            "n_kv_heads", f"= {sizes['num_kv_heads']} does not divide n_heads = {sizes['num_heads']}"
        )
    if sizes["head_dim"] % 2:
        fields.refuse("head_dim", f"= {sizes['head_dim']} must be even for rotary embedding")
    windows = _windows(fields, sizes["num_layers"])
    theta = fields.number("rope_theta", 1e6 if windows == (None,) * len(windows) else 1e4)
    if theta <= 1:
        fields.refuse("rope_theta", f"must be above 1, got {theta:g}")
    limit = ARCHITECTURE_LIMITS["max_context"]
    context = fields.integer("max_seq_len", 1, limit, DEFAULT_CONTEXT)
    sizes["max_context"] = fields.integer("max_position_embeddings", 1, limit, context)
    sizes["num_experts"], sizes["experts_per_token"] = _experts(fields)
    mixed = any(window is not None for window in windows) and None in windows
    return build_config(
        origin,
        family="mixtral" if sizes["num_experts"] else "ministral" if mixed else "mistral",
        rope_scaling=_yarn(fields) if "yarn" in fields else None,
        windows=windows,
        tied_embeddings=fields.boolean("tied_embeddings", False),
        floats={"rope_theta": theta, "norm_eps": fields.number("norm_eps", below=1.0)},
        integers=sizes,
    )


def _windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer; a list is a pattern that repeats, null in it means full attention.

    Example: [null, 32768] over 4 layers gives (None, 32768, None, 32768). Ministral 8B names the field
    `_sliding_window`.
    """
    names = [name for name in ("sliding_window", "_sliding_window") if name in fields]
    if len(names) == 2:
        fields.refuse("_sliding_window", "is given beside sliding_window; keep one of them")
    if not names:
        return (None,) * num_layers
    name = names[0]
    limit = ARCHITECTURE_LIMITS["max_context"]
    if not isinstance(fields.values[name], list):
        return (fields.integer(name, 1, limit),) * num_layers
    pattern = fields.items(name)
    if not pattern or num_layers % len(pattern):
        fields.refuse(
            name, f"has a pattern of {len(pattern)} layers, which does not divide n_layers = {num_layers}"
        )
    windows: list[int | None] = []
    for window in pattern:
        if window is not None and not (type(window) is int and 1 <= window <= limit):
            fields.refuse(name, f"must hold null or integers from 1 to {limit}, got {quoted(window)}")
        windows.append(window)
    return tuple(windows) * (num_layers // len(pattern))


def _experts(fields: ConfigFields) -> tuple[int, int]:
    if "moe" not in fields:
        return 0, 0
    moe = fields.nested("moe")
    for name, value in moe.values.items():
        if name not in ("num_experts", "num_experts_per_tok") and value is not None:
            moe.refuse(name, f"= {quoted(value)} is not supported; known: num_experts, num_experts_per_tok")
    experts = moe.integer("num_experts", 1, ARCHITECTURE_LIMITS["num_experts"])
    return experts, moe.integer("num_experts_per_tok", 1, experts)


def _yarn(fields: ConfigFields) -> RopeScaling:
    """Return the scaling of `yarn`; `beta` and `alpha` are beta_fast and beta_slow elsewhere.

    `apply_scale` false means no factor on cos and sin, as vLLM reads it.
    """
    yarn = fields.nested("yarn")
    known = ("factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale")
    for name, value in yarn.values.items():
        if name not in known and value is not None:
            yarn.refuse(name, f"= {quoted(value)} is not supported; known: {', '.join(known)}")
    fast, slow = yarn.number("beta", 32.0), yarn.number("alpha", 1.0)
    if fast <= slow:
        yarn.refuse("beta", f"= {fast:g} must be above alpha = {slow:g}")
    try:
        return RopeScaling(
            kind="yarn",
            factor=yarn.number("factor"),
            original_context=yarn.integer(
                "original_max_position_embeddings", 1, ARCHITECTURE_LIMITS["max_context"]
            ),
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=None if yarn.boolean("apply_scale", True) else 1.0,
        )
    except ConfigError as error:
        raise ModelFileError(f"{fields.origin}: {error}", field=error.field) from error
