"""Random edits of config.json and params.json: an error of ours or a usable architecture, nothing else."""

from __future__ import annotations

import importlib
import random
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bise.config import ModelConfig
from bise.errors import ModelFileError
from bise.model.hf_config import read_hf_config
from bise.model.mistral_params import read_mistral_params
from bise.model.rope import rope_frequencies

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))
tiny = importlib.import_module("sound_models")

EDITS = 4000

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 4, 8, 16, 1 << 20, 1 << 31, 1 << 63, 10**39),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 1e-30, 1e14, 1e300, -1e300),
    *("", "4", "silu", "linear", "yarn", "\x1b[0m"),
    *([], [None], [4], [True, 4], [None, 4], ["full_attention", "sliding_attention"]),
    *({}, {"a": 1}, {"factor": 2.0}),
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.2},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
YARN = {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": True}
MORE_FIELDS = (
    "layer_types",
    "use_sliding_window",
    "rope_scaling",
    "num_local_experts",
    "mlp_bias",
    "x_scale",
)


def edited(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return `values` with one or two fields, perhaps nested ones, replaced or dropped."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([*values, *MORE_FIELDS])
        target = values[name] if isinstance(values.get(name), dict) and rng.random() < 0.8 else values
        name = rng.choice([*target]) if target is not values and target else name
        if rng.random() < 0.15:
            target.pop(name, None)
        else:
            target[name] = rng.choice(VALUES)
    return values


def check(config: ModelConfig) -> None:
    frequencies, factor = rope_frequencies(config)
    assert frequencies.shape == (config.head_dim // 2,)
    assert np.isfinite(frequencies).all()
    assert 0 < factor < 1e18
    assert len(config.windows) == config.num_layers
    assert config.num_params > 0


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_edited_configurations_are_refused_in_one_line_or_usable(layout: str) -> None:
    rng = random.Random(11)
    counts: Counter[str] = Counter()
    messages: set[str] = set()
    for number in range(EDITS):
        if layout == "hf":
            values = tiny.base_config() | {"rope_scaling": ROPES[number % len(ROPES)]}
        else:
            values = tiny.base_params() | {"yarn": YARN, "sliding_window": [None, 4]}
        values = edited(values, rng)
        reader = read_hf_config if layout == "hf" else read_mistral_params
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                check(reader(values, "config.json"))
                counts["usable"] += 1
            except ModelFileError as error:
                messages.add(str(error))
                counts["refused"] += 1
    for message in messages:
        assert message.startswith("config.json: ")
        assert message.isprintable()
        assert len(message) < 500
    assert min(counts["usable"], counts["refused"]) > EDITS // 10
