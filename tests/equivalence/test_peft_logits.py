"""Adapters that the real `peft` package saved give the logits that it computes.

The reference is float64 throughout, as in test_hf_logits.py.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bise.model.batch import AdaptedRows, Batch, training_batch
from bise.model.checkpoint import open_model
from bise.model.lora import load_adapter, open_adapter
from bise.model.source import ModelSource
from bise.model.transformer import Transformer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parent))
hf: Any = importlib.import_module("test_hf_logits")
sys.path.pop(0)

RELATIVE = 1e-9
"""Bound on max |difference| / max |logit| of the float64 backend; measured: below 1e-14."""

RELATIVE_FLOAT32 = 2e-5
"""The same for the cpu backend on float32 weights; measured: below 6e-6."""

# peft asks transformers in a way that the next version of it drops.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = EVERY[:4]

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION},
    "every projection": {"r": 3, "lora_alpha": 5, "target_modules": EVERY},
    "values alone": {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj"]},
    "feed-forward alone": {"r": 2, "lora_alpha": 2, "target_modules": ["mlp.up_proj", "mlp.down_proj"]},
    "rank stabilised": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": EVERY},
    "all linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "one layer": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
    },
    "ranks by pattern": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": EVERY,
        "rank_pattern": {
            "model.layers.0.self_attn.q_proj": 5,
            "^model.layers.1.mlp.down_proj": 7,
            "v_proj": 1,
        },
        "alpha_pattern": {"layers.2.self_attn.o_proj": 9, "up_proj": 1},
    },
}


class Tuned:
    """A random base model on disk, an adapter that peft saved for it, and peft's float64 logits."""

    def __init__(self, case: str, base: Path, settings: dict[str, Any], adapter: Path, dtype: Any) -> None:
        self.base, self.adapter = base, adapter
        family = hf.CASES[case][0].lower()
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        rope = importlib.import_module("transformers.modeling_rope_utils")
        model = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(
            base, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        torch.manual_seed(5)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn_like(parameter) * 0.1).to(dtype)
        tuned.save_pretrained(adapter)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling, "torch", hf._Float64Torch())
            patch.setattr(rope, "torch", hf._Float64Torch())
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            tuned = tuned.double()
            inner = tuned.base_model.model.model
            inner.rotary_emb = type(inner.rotary_emb)(config=inner.config)
            with torch.no_grad():
                self.logits = tuned(torch.as_tensor(hf.token_ids(), dtype=torch.int64)).logits.numpy()
        assert self.logits.dtype == np.float64


@pytest.fixture(scope="module")
def tune(tmp_path_factory):
    """Return a function from (case, adapter settings) to a `Tuned` and the plain logits of its base."""
    torch.set_num_threads(1)
    bases: dict[str, tuple[Path, np.ndarray]] = {}

    def make(case: str, settings: dict[str, Any], dtype: Any = torch.float32) -> tuple[Tuned, np.ndarray]:
        if case not in bases:
            directory = tmp_path_factory.mktemp(case)
            bases[case] = directory, hf.save_model(case, directory)
        base, plain = bases[case]
        return Tuned(case, base, settings, tmp_path_factory.mktemp("adapter"), dtype), plain

    return make


def adapted(batch: Batch, source: ModelSource, directory: Path, ops: Any, rows: np.ndarray) -> Batch:
    adapter = load_adapter(open_adapter(directory, source.config), ops)
    return replace(batch, adapted=(AdaptedRows(adapter.loras, rows.astype(np.intp)),))


def logits_of(tuned: Tuned, backend: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Return logits [S, L, V], the adapter on `rows` of the step or on all."""
    make_ops, is_paged, _ = hf.BACKENDS[backend]
    ops, source = make_ops(), open_model(tuned.base)
    weights: dict[str, Any] = {}
    for name, tensor in source.tensors.items():
        make = ops.vector if len(tensor.shape) == 1 else ops.weight
        weights[name] = make(tensor.floats(0, tensor.shape[0]))
    model = Transformer(source.config, weights, ops)
    groups = len(source.config.window_groups)
    batch = hf.paged_batch(groups) if is_paged else training_batch(hf.token_ids(), groups)
    batch = adapted(batch, source, tuned.adapter, ops, np.arange(2 * hf.LENGTH) if rows is None else rows)
    with torch.no_grad():
        hidden = model.forward(batch, hf.Cache(source, ops, 4) if is_paged else None)
        logits = np.asarray(model.logits(hidden))
    return logits.reshape(*hf.token_ids().shape, -1)


BOUNDS = {"torch": RELATIVE, "torch-paged": RELATIVE, "cpu-paged": RELATIVE_FLOAT32}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_gives_the_logits_that_peft_computes(settings, tune):
    tuned, plain = tune("nemo_wide_heads", settings)
    assert hf.relative_difference(plain, tuned.logits) > 1e-3
    for backend, bound in BOUNDS.items():
        assert hf.relative_difference(logits_of(tuned, backend), tuned.logits) <= bound, backend


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_16_bits_keeps_its_values(dtype, tune):
    tuned, _ = tune("llama_tied", ADAPTERS["every projection"], getattr(torch, dtype))
    for backend, bound in BOUNDS.items():
        assert hf.relative_difference(logits_of(tuned, backend), tuned.logits) <= bound, backend


def test_a_mixture_of_experts_is_adapted_in_its_attention(tune):
    tuned, plain = tune("mixtral_window_odd", ADAPTERS["attention"])
    assert hf.relative_difference(plain, tuned.logits) > 1e-3
    for backend, bound in BOUNDS.items():
        assert hf.relative_difference(logits_of(tuned, backend), tuned.logits) <= bound, backend


def test_only_the_rows_that_name_an_adapter_get_it(tune):
    tuned, plain = tune("nemo_wide_heads", ADAPTERS["every projection"])
    expected = np.stack([plain[0], tuned.logits[1]])
    second = np.arange(hf.LENGTH, 2 * hf.LENGTH)
    for backend, bound in BOUNDS.items():
        assert hf.relative_difference(logits_of(tuned, backend, second), expected) <= bound, backend
