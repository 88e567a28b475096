"""Requests with LoRA adapters return the same bits alone, next to other adapters, next to none, chunked and
preempted; requests without one return the bits of an engine that has none.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from bise.engine.request import Request
from bise.errors import ConfigError, ModelNotFoundError, RequestError
from bise.model.lora import Adapter
from bise.model.transformer import weight_shapes

sys.path.insert(0, str(Path(__file__).parent))
identities = importlib.import_module("test_identities")
sys.path.pop(0)
ask = identities.ask

pytestmark = [
    pytest.mark.parametrize("backend", ["cpu-f32", "cpu-q8", "cpu-q4"], indirect=True, scope="session"),
    pytest.mark.parametrize("model", ["interleaved", "8 experts"], indirect=True, scope="session"),
]

PARTS = {"a": ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "b": ("wq", "wo", "w2"), "c": ("wv",)}


def make_adapter(model, ops, name: str) -> Adapter:
    rng = np.random.default_rng(ord(name))
    rank = {"a": 3, "b": 16, "c": 1}[name]
    loras = {}
    for weight, shape in weight_shapes(model.config).items():
        if weight.rpartition(".")[2] in PARTS[name] and ".experts." not in weight:
            a = rng.standard_normal((rank, shape[1]), np.float32) * 0.3
            b = rng.standard_normal((shape[0], rank), np.float32) * 0.3
            loras[weight] = ops.lora(a, b, 0.7)
    return Adapter(path=Path(name), sha256=name * 64, rank=rank, size_bytes=0, loras=loras)


@pytest.fixture(scope="session")
def adapters(model, ops):
    return {name: make_adapter(model, ops, name) for name in PARTS}


@pytest.fixture
def engine(make_engine, adapters):
    """Return a function that makes an engine with the adapters a, b and c."""

    def make(**options):
        engine = make_engine(**options)
        for name, adapter in adapters.items():
            engine.adapters.add(name, adapter)
        return engine

    return make


def with_adapter(request: Request, adapter: str | None) -> Request:
    return Request(
        token_ids=request.token_ids,
        params=request.params,
        prompt_logprobs=request.prompt_logprobs,
        adapter=adapter,
    )


MIXED = [
    with_adapter(request, adapter)
    for request, adapter in zip(
        [*identities.REQUESTS, *identities.REQUESTS[:3]],
        ["a", None, "b", "a", "c", "b", None, None],
        strict=True,
    )
]
"""Every kind of request with and without an adapter, some prompts under two of them."""


def outcome(done) -> tuple:
    return done.token_ids, done.logprobs, done.prompt_logprobs


@pytest.fixture(scope="session")
def alone(make_engine, adapters):
    """What each of `MIXED` returns on its own, in an engine that knows its adapter only."""
    found = []
    for request in MIXED:
        engine = make_engine()
        if request.adapter is not None:
            engine.adapters.add(request.adapter, adapters[request.adapter])
        found.append(outcome(engine.submit(request).result()))
    return found


def test_an_adapter_changes_the_output(alone):
    for request, found in zip(MIXED, alone, strict=True):
        for other, rival in zip(MIXED, alone, strict=True):
            if request.token_ids == other.token_ids and request.adapter != other.adapter:
                assert found[1] != rival[1]


@pytest.mark.parametrize(
    "options", [{}, {"max_step_tokens": 32}, {"num_blocks": 4, "max_step_tokens": 16, "max_sequences": 5}]
)
def test_a_batch_of_several_adapters_equals_alone(engine, alone, options):
    running = engine(**options)
    handles = [running.submit(request) for request in MIXED]
    assert [outcome(handle.result()) for handle in handles] == alone
    identities.assert_no_block_is_held(running)


def test_arriving_while_others_run_equals_alone(engine, alone):
    running = engine()
    handles = []
    for request in reversed(MIXED):
        handles.append(running.submit(request))
        running.step()
        running.step()
    assert [outcome(handle.result()) for handle in reversed(handles)] == alone


def test_a_prompt_cached_under_one_adapter_is_not_reused_under_another(engine, make_engine, adapters):
    """The same prompt one after the other in one engine: the keys and values of each are its own."""
    running = engine()
    for adapter in ("a", None, "b", "a", None):
        request = with_adapter(ask(100, 11, max_tokens=4), adapter)
        fresh = make_engine()
        if adapter is not None:
            fresh.adapters.add(adapter, adapters[adapter])
        assert outcome(running.submit(request).result()) == outcome(fresh.submit(request).result())


def test_adapters_come_and_go_while_requests_run(engine, make_engine, adapters, alone):
    running = make_engine()
    running.adapters.add("x", adapters["a"])
    first = running.submit(with_adapter(MIXED[0], "x"))
    running.step()
    running.adapters.remove("x")
    with pytest.raises(RequestError, match="'x' is not loaded; loaded: none"):
        running.submit(with_adapter(MIXED[0], "x"))
    running.adapters.add("x", adapters["b"])
    second = running.submit(with_adapter(MIXED[2], "x"))
    assert outcome(first.result()) == alone[0]
    assert outcome(second.result()) == alone[2]


def test_a_name_means_one_adapter(engine, adapters):
    running = engine()
    running.adapters.add("a", adapters["a"])
    with pytest.raises(ConfigError, match="another loaded adapter"):
        running.adapters.add("a", adapters["b"])
    with pytest.raises(ModelNotFoundError, match="loaded: a, b, c"):
        running.adapters.remove("d")
    assert running.adapters.names() == ("a", "b", "c")


@pytest.mark.slow
def test_a_thousand_interleaved_requests_never_mix_two_adapters(engine):
    prompts = [ask(20 + seed % 7, seed, max_tokens=3) for seed in range(25)]
    expected = {}
    for adapter in ("a", "b"):
        for index, request in enumerate(prompts):
            expected[adapter, index] = outcome(engine().submit(with_adapter(request, adapter)).result())
    running = engine()
    order = [("ab"[number % 2], number * 7 % len(prompts)) for number in range(1000)]
    for start in range(0, 1000, 50):
        part = order[start : start + 50]
        handles = [running.submit(with_adapter(prompts[index], adapter)) for adapter, index in part]
        assert [outcome(handle.result()) for handle in handles] == [expected[key] for key in part]
