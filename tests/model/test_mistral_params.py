"""params.json of Mistral's own releases."""

from __future__ import annotations

from typing import Any

import pytest

from bise.config import ModelConfig, RopeScaling
from bise.errors import ModelFileError
from bise.model.mistral_params import read_mistral_params

V03: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
}


def read(**changes: Any) -> ModelConfig:
    return read_mistral_params(V03 | changes, "params.json")


def test_mistral_7b_v03_has_no_window() -> None:
    config = read()
    assert config.windows == (None,) * 32
    assert (config.family, config.rope_theta, config.max_context) == ("mistral", 1e6, 128_000)


def test_theta_defaults_to_a_million_without_a_window_and_ten_thousand_with_one() -> None:
    assert read(rope_theta=None).rope_theta == 1e6
    assert read(rope_theta=None, sliding_window=4096).rope_theta == 1e4


@pytest.mark.parametrize("name", ["sliding_window", "_sliding_window"])
def test_a_window_pattern_repeats_over_the_layers(name: str) -> None:
    config = read(**{name: [None, 32768, 32768, 32768]})
    assert config.windows == (None, 32768, 32768, 32768) * 8
    assert config.family == "ministral"


def test_a_mixture_names_its_experts() -> None:
    config = read(moe={"num_experts": 8, "num_experts_per_tok": 2})
    assert (config.family, config.num_experts, config.experts_per_token) == ("mixtral", 8, 2)


def test_yarn_alpha_and_beta_are_the_slow_and_fast_rotations() -> None:
    yarn = {
        "factor": 16,
        "original_max_position_embeddings": 16384,
        "beta": 32,
        "alpha": 1,
        "apply_scale": False,
    }
    assert read(yarn=yarn).rope_scaling == RopeScaling(
        kind="yarn", factor=16.0, original_context=16384, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0
    )


def test_a_context_that_is_given_wins_over_the_default() -> None:
    assert read(max_position_embeddings=32768).max_context == 32768
    assert read(max_seq_len=16384).max_context == 16384


def test_a_vision_model_is_refused_by_the_field() -> None:
    with pytest.raises(ModelFileError, match=r"params\.json: vision_encoder"):
        read(vision_encoder={"hidden_size": 1024})
