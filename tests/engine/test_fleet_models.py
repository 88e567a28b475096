"""A fleet of real, tiny models: plans that hold, adapters, and the same bits after each reload."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bise.engine.fleet import Fleet
from bise.engine.model_spec import AdapterSpec, ModelSpec, adapter_bytes
from bise.engine.request import Request, SamplingParams
from bise.errors import MemoryPlanError, ModelFileError
from bise.model.checkpoint import open_model
from bise.model.lora import BASE_HASH
from bise.model.packed import content_hash

sys.path.insert(0, str(Path(__file__).parent))
sized = importlib.import_module("sized_model")
sys.path.pop(0)

SIZE = sized.Size(dim=64, layers=2, heads=4, kv_heads=2, hidden=96, vocab=400, max_context=256)
OTHER = sized.Size(dim=96, layers=1, heads=4, kv_heads=2, hidden=96, vocab=400, max_context=256)


def write_adapter(path: Path, seed: int, metadata: dict[str, str] | None = None) -> Path:
    path.mkdir()
    rng = np.random.default_rng(seed)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    weights = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.v_proj"
        weights[f"{stem}.lora_A.weight"] = rng.standard_normal((4, 64)).astype(np.float32)
        weights[f"{stem}.lora_B.weight"] = rng.standard_normal((32, 4)).astype(np.float32)
    save_file(weights, path / "adapter_model.safetensors", metadata)
    return path


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))


@pytest.fixture
def specs(tmp_path):
    adapters = tuple(
        AdapterSpec(name=name, path=write_adapter(tmp_path / name, seed)) for seed, name in enumerate("xy")
    )
    return [
        ModelSpec(name="a", path=sized.write(tmp_path, SIZE), quant="q8", threads=1, adapters=adapters),
        ModelSpec(name="b", path=sized.write(tmp_path, OTHER), quant="q8", threads=1),
    ]


def ask(fleet: Fleet, name: str) -> tuple:
    lease = fleet.acquire(name)
    try:
        params = SamplingParams(max_tokens=8, seed=1, logprobs=0, ignore_eos=True)
        request = Request(token_ids=(5, 300, 301, 302), params=params, adapter=lease.adapter)
        done = lease.loaded.engine.submit(request).result()
        return done.token_ids, done.logprobs
    finally:
        lease.release()


def test_models_and_adapters_give_the_same_bits_after_every_reload(specs):
    names = ("a", "a:x", "b", "a:y")
    with Fleet(specs, 1 << 30) as roomy:
        expected = [ask(roomy, name) for name in names]
        sizes = [card.plan.size_bytes for card in roomy.cards()]
        adapters = sum(card.size_bytes for card in roomy.card("a").adapters)
        assert [card.state for card in roomy.cards()] == ["ready", "ready"]
    assert len({str(outcome) for outcome in expected}) == 4
    with Fleet(specs, max(sizes) + adapters) as tight:
        for _ in range(2):
            assert [ask(tight, name) for name in names] == expected
            assert [card.state for card in tight.cards()] == ["ready", "cold"]


def test_an_adapter_comes_goes_and_comes_back_beside_running_requests(specs, tmp_path):
    late = write_adapter(tmp_path / "late", 7)
    with Fleet(specs, 1 << 30) as fleet:
        plain = ask(fleet, "a")
        fleet.add_adapter("a", "late", late)
        first = ask(fleet, "a:late")
        assert first not in (plain, ask(fleet, "a:x"))
        fleet.remove_adapter("a", "late")
        assert fleet.acquire("a").loaded.engine.adapters.names() == ("x",)
        fleet.add_adapter("a", "late", late)
        assert ask(fleet, "a:late") == first
        with pytest.raises(ModelFileError, match="layer that the model does not have"):
            fleet.add_adapter("b", "late", late)


def test_an_adapter_signed_for_other_weights_is_refused_at_its_first_use(specs, tmp_path):
    right = {BASE_HASH: content_hash(open_model(specs[0].path))}
    with Fleet(specs, 1 << 30) as fleet:
        fleet.add_adapter("a", "right", write_adapter(tmp_path / "right", 3, right))
        fleet.add_adapter("a", "wrong", write_adapter(tmp_path / "wrong", 3, {BASE_HASH: "0" * 64}))
        assert ask(fleet, "a:right")
        with pytest.raises(ModelFileError, match="trained on"):
            ask(fleet, "a:wrong")


def test_the_memory_of_an_adapter_is_known_from_its_header(specs):
    size = adapter_bytes(specs[0], specs[0].adapters[0].path)
    assert size == 2 * 4 * (16 * 64 + 32 * 4)


def test_a_context_that_does_not_fit_is_refused_up_front(specs):
    with Fleet(specs, 1 << 16) as fleet:
        assert all(card.fault for card in fleet.cards())
        with pytest.raises(MemoryPlanError):
            fleet.wake("a")


@pytest.mark.parametrize("is_serving", [False, True])
def test_the_memory_of_a_model_is_free_when_it_sleeps(specs, is_serving):
    with Fleet(specs[1:]) as fleet:
        ask(fleet, "b")
        lease = fleet.acquire("b")
        model = weakref.ref(lease.loaded.engine._runner._model)
        lease.release()
        del lease
        if is_serving:
            gc.freeze()
        try:
            assert model() is not None
            fleet.sleep("b", wait_s=5)
            assert model() is None
            assert bool(gc.get_freeze_count()) == is_serving
        finally:
            gc.unfreeze()
