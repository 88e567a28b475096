"""GGUF files whose container is sound but whose model is not, and files that must open."""

from __future__ import annotations

import struct
from collections.abc import Callable

from gguf_draft import (
    ARR,
    BOOL,
    DIM,
    F32,
    F64,
    HIDDEN,
    I32,
    STR,
    U8,
    U16,
    U32,
    U64,
    Draft,
    Tensor,
    array,
    attribute_of,
    case_of,
    edit_of,
    key_of,
    scalar,
    string,
    tensor_of,
    valid,
)

Q, UP, NORM = "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output_norm.weight"


def _without(name: str) -> Callable[[Draft], None]:
    return edit_of(lambda draft: draft.tensors.remove(draft.tensor(name)))


def _extra(name: str, dims: list[int]) -> Callable[[Draft], None]:
    return edit_of(lambda draft: draft.tensors.append(Tensor(name, dims)))


MODEL_CASES = [
    case_of("a weight is missing", "11 tensors|blk.0.attn_q.weight is missing|10 tensors", _without(Q)),
    case_of(
        "embeddings are missing", "token_embd.weight is missing|10 tensors", _without("token_embd.weight")
    ),
    tensor_of(
        "a weight has a stranger's name", "blk.0.attn_q.weight is missing", Q, name="blk.0.attn_qkv.weight"
    ),
    case_of("a bias", "no part of such a network: 'blk.0.attn_q.bias'", _extra("blk.0.attn_q.bias", [32])),
    case_of(
        "an extra layer",
        "no part of such a network: 'blk.1.attn_q.weight'",
        _extra("blk.1.attn_q.weight", [DIM, 32]),
    ),
    tensor_of("shape transposed", r"blk.0.ffn_up.weight has shape \[32, 64\]", UP, dims=[HIDDEN, DIM]),
    tensor_of("shape with a trailing 1", "output_norm.weight has shape", NORM, dims=[DIM, 1]),
    tensor_of("norm broadcastable", r"output_norm.weight has shape \[1\]", NORM, dims=[1]),
    tensor_of("norm quantised", "output_norm.weight is Q8_0; a vector must be", NORM, kind=8, data=bytes(34)),
    key_of("no architecture", "general.architecture is missing; known: llama", "general.architecture", None),
    key_of(
        "foreign architecture",
        "general.architecture is 'qwen2', which is not supported; known: llama",
        "general.architecture",
        string("qwen2"),
    ),
    key_of("architecture as a number", "general.architecture is 3", "general.architecture", scalar(U32, 3)),
    key_of("an adapter", "general.type is 'adapter'", "general.type", string("adapter")),
    key_of(
        "quantisation version 1",
        "general.quantization_version is 1",
        "general.quantization_version",
        scalar(U32, 1),
    ),
    key_of("block count missing", "llama.block_count is missing", "llama.block_count", None),
    key_of("block count 0", "llama.block_count", "llama.block_count", scalar(U32, 0)),
    key_of("block count 2", "llama.block_count|11 tensors, too few", "llama.block_count", scalar(U32, 2)),
    key_of(
        "block count of ones",
        "llama.block_count must be between 0 and 1024",
        "llama.block_count",
        scalar(U32, 0xFFFFFFFF),
    ),
    key_of("block count negative", "llama.block_count must be between", "llama.block_count", scalar(I32, -1)),
    key_of(
        "block count as a string",
        "llama.block_count must be an integer, got '1'",
        "llama.block_count",
        string("1"),
    ),
    key_of(
        "block count as a float",
        "llama.block_count must be an integer, got 1.0",
        "llama.block_count",
        scalar(F32, 1.0),
    ),
    key_of(
        "block count as a bool",
        "llama.block_count must be an integer, got True",
        "llama.block_count",
        scalar(BOOL, 1),
    ),
    key_of(
        "heads 0",
        "llama.attention.head_count must be at least 1",
        "llama.attention.head_count",
        scalar(U32, 0),
    ),
    key_of(
        "heads that do not divide",
        "5 does not divide embedding_length 32",
        "llama.attention.head_count",
        scalar(U32, 5),
    ),
    key_of(
        "key/value heads that do not divide",
        "llama.attention.head_count_kv",
        "llama.attention.head_count_kv",
        scalar(U32, 3),
    ),
    key_of(
        "key/value heads that vary",
        "varies from layer to layer",
        "llama.attention.head_count_kv",
        array(U32, [2, 1]),
    ),
    key_of("head width odd", "but heads are 7 wide", "llama.attention.key_length", scalar(U32, 7)),
    key_of(
        "head width 0",
        "heads are 0 wide|llama.attention.key_length",
        "llama.attention.key_length",
        scalar(U32, 0),
    ),
    key_of(
        "key width other than value width",
        "llama.attention.value_length is 16",
        "llama.attention.value_length",
        scalar(U32, 16),
    ),
    key_of(
        "rotary over half a head",
        "llama.rope.dimension_count is 4",
        "llama.rope.dimension_count",
        scalar(U32, 4),
    ),
    key_of("context 0", "llama.context_length", "llama.context_length", scalar(U32, 0)),
    key_of("context missing", "llama.context_length is missing", "llama.context_length", None),
    key_of(
        "context 2^63", "llama.context_length must be between", "llama.context_length", scalar(U64, 1 << 63)
    ),
    key_of(
        "vocabulary other than the embedding",
        "llama.vocab_size is 47, but token_embd.weight has 48",
        "llama.vocab_size",
        scalar(U32, 47),
    ),
    key_of(
        "tokens other than the embedding",
        "tokens has 49 tokens, but token_embd.weight has 48",
        "tokenizer.ggml.tokens",
        array(STR, ["x"] * 49),
    ),
    key_of(
        "epsilon missing", "layer_norm_rms_epsilon is missing", "llama.attention.layer_norm_rms_epsilon", None
    ),
    key_of(
        "epsilon NaN",
        "layer_norm_rms_epsilon must be finite",
        "llama.attention.layer_norm_rms_epsilon",
        scalar(F32, float("nan")),
    ),
    key_of(
        "epsilon negative",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.attention.layer_norm_rms_epsilon",
        scalar(F32, -1e-5),
    ),
    key_of(
        "rotary base infinite",
        "llama.rope.freq_base must be finite",
        "llama.rope.freq_base",
        scalar(F32, float("inf")),
    ),
    key_of("rotary base 0", "llama.rope.freq_base", "llama.rope.freq_base", scalar(F32, 0.0)),
    key_of(
        "scaling of a foreign type",
        "llama.rope.scaling.type is 'longrope'; known: none",
        "llama.rope.scaling.type",
        string("longrope"),
    ),
    key_of(
        "scaling type as a number",
        "llama.rope.scaling.type must be a string",
        "llama.rope.scaling.type",
        scalar(U32, 2),
    ),
    key_of("scaling factor below 1", "llama.rope.scaling", "llama.rope.scaling.factor", scalar(F32, 0.5)),
    key_of(
        "scaling factor NaN",
        "llama.rope.scaling.factor must be finite",
        "llama.rope.scaling.factor",
        scalar(F32, float("nan")),
    ),
    key_of(
        "yarn key without yarn",
        "llama.rope.scaling.yarn_beta_fast means nothing",
        "llama.rope.scaling.yarn_beta_fast",
        scalar(F32, 8.0),
    ),
    key_of(
        "window negative",
        "llama.attention.sliding_window must be between",
        "llama.attention.sliding_window",
        scalar(I32, -4),
    ),
    key_of(
        "window pattern without window",
        "is given without attention.sliding_window",
        "llama.attention.sliding_window_pattern",
        scalar(U32, 2),
    ),
    key_of(
        "window pattern of wrong length",
        "must list 1 bools",
        "llama.attention.sliding_window_pattern",
        array(BOOL, [1, 0]),
    ),
    key_of(
        "softcapping",
        "attn_logit_softcapping is 50.0; bise computes only 0.0",
        "llama.attn_logit_softcapping",
        scalar(F32, 50.0),
    ),
    key_of(
        "position-dependent temperature",
        "temperature_scale is 0.1",
        "llama.attention.temperature_scale",
        scalar(F64, 0.1),
    ),
    key_of(
        "unknown key of the architecture",
        "llama.residual_norm means nothing to bise",
        "llama.residual_norm",
        scalar(U32, 1),
    ),
    key_of("experts without a count in use", "must be given together", "llama.expert_count", scalar(U32, 4)),
    key_of(
        "more experts in use than there are",
        "llama.expert_count: num_experts and",
        "llama.expert_used_count",
        scalar(U32, 2),
    ),
    case_of(
        "rope_freqs of wrong length",
        r"llama.rope.scaling: rope_scaling.factors has 8 values",
        edit_of(
            lambda d: d.tensors.append(
                Tensor("rope_freqs.weight", [8], data=struct.pack("<8f", *range(1, 9)))
            )
        ),
    ),
    case_of(
        "rope_freqs of zeros",
        "rope_freqs.weight must hold positive numbers",
        edit_of(lambda d: d.tensors.append(Tensor("rope_freqs.weight", [4]))),
    ),
    key_of(
        "split count without the name",
        "split.count is 2, so its name must end in",
        "split.count",
        scalar(U16, 2),
    ),
    key_of("split count as a string", "split.count must be an integer", "split.count", string("2")),
    key_of(
        "split tensor count",
        "split.tensors.count is 12, but the parts have 11",
        "split.tensors.count",
        scalar(I32, 12),
    ),
]


def _rope_ones(draft: Draft) -> None:
    draft.tensors.append(Tensor("rope_freqs.weight", [4], data=struct.pack("<4f", 1, 1, 1, 1)))


def _mistral3(draft: Draft) -> Draft:
    return valid("mistral3")


def _aligned(draft: Draft) -> None:
    draft.keys["general.alignment"] = scalar(U32, 128)
    draft.alignment = 128


MUST_OPEN = [
    case_of("valid", "", lambda draft: None),
    attribute_of("version 2", "", version=2),
    case_of("alignment 128", "", _aligned),
    case_of("architecture mistral3", "", _mistral3),
    case_of("last tensor not padded", "", lambda draft: draft.build()),
    key_of(
        "unknown key outside the architecture", "", "general.whatever", array(ARR, [array(U8, [1, 2])[4:]])
    ),
    key_of("per-layer heads that agree", "", "llama.attention.head_count_kv", array(I32, [2])),
    key_of("inert key", "", "llama.expert_weights_norm", scalar(BOOL, 1)),
    key_of("no key/value head count", "", "llama.vocab_size", None),
    case_of("rope_freqs of ones", "", _rope_ones),
]
