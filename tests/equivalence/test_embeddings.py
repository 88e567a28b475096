"""Vectors of prompts: equal to what transformers' hidden states give, and the same bits however computed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from bise.engine.engine import Engine
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.model.checkpoint import open_model
from bise.model.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
hf = importlib.import_module("test_hf_logits")
identities = importlib.import_module("test_identities")
sys.path.pop(0)

NO_TOKENS = SamplingParams(max_tokens=0)


def vector_of(token_ids, pooling, **fields) -> Request:
    return Request(token_ids=tuple(token_ids), params=NO_TOKENS, pooling=pooling, **fields)


@pytest.fixture(scope="module", params=["mistral_window_below_length", "llama", "mixtral_8_experts_top_2"])
def saved(request, tmp_path_factory):
    """Return (directory, the final normed hidden states [S, L, E] that transformers computes in float32)."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param)
    hf.save_model(request.param, directory)
    model = transformers.AutoModel.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        states = model(torch.as_tensor(hf.token_ids(), dtype=torch.int64)).last_hidden_state
    return directory, states.double().numpy()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("backend", ["torch-paged", "cpu-paged"])
def test_vectors_equal_those_from_the_hidden_states_of_transformers(saved, backend, pooling):
    directory, states = saved
    source, ops = open_model(directory), hf.BACKENDS[backend][0]()
    weights = {
        name: (ops.vector if len(tensor.shape) == 1 else ops.weight)(tensor.floats(0, tensor.shape[0]))
        for name, tensor in source.tensors.items()
    }
    engine = Engine(
        Transformer(source.config, weights, ops),
        ops,
        config=source.config,
        tokenizer=None,
        num_blocks=8,
        kv_format="f32",
        max_step_tokens=32,
        threaded=False,
    )
    pooled = states[:, -1] if pooling == "last" else states.mean(1)
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    with torch.no_grad(), engine:
        handles = [engine.submit(vector_of(row.tolist(), pooling)) for row in hf.token_ids()]
        found = np.array([handle.result().embedding for handle in handles])
    np.testing.assert_allclose(found, expected, atol=5e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


exact = pytest.mark.parametrize("backend", ["cpu-f32", "cpu-q8"], indirect=True, scope="session")
models = pytest.mark.parametrize("model", ["interleaved", "8 experts"], indirect=True, scope="session")

PROMPTS = [(identities.prompt(length, length), kind) for length in (1, 33, 100) for kind in ("last", "mean")]


@exact
@models
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 16, "max_sequences": 4},
        {"num_blocks": 5, "max_step_tokens": 16, "max_sequences": 9},
    ],
    ids=["whole", "chunked", "short of blocks"],
)
def test_a_vector_has_the_same_bits_in_any_company_and_any_chunks(make_engine, options):
    alone = [make_engine().submit(vector_of(*prompt)).result().embedding for prompt in PROMPTS]
    engine = make_engine(**options)
    others = [engine.submit(request) for request in identities.REQUESTS[:3]]
    handles = [engine.submit(vector_of(*prompt)) for prompt in PROMPTS]
    found = [handle.result() for handle in handles]
    assert [done.embedding for done in found] == alone
    assert all(done.finish_reason is FinishReason.LENGTH and not done.token_ids for done in found)
    plain = [make_engine().submit(request).result() for request in identities.REQUESTS[:3]]
    assert [handle.result().logprobs for handle in others] == [done.logprobs for done in plain]
    identities.assert_no_block_is_held(engine)


@exact
@models
def test_a_cached_prefix_does_not_change_a_vector(make_engine):
    engine = make_engine()
    for kind in ("last", "mean"):
        request = vector_of(identities.prompt(100, 4), kind)
        first, second = (engine.submit(request).result() for _ in range(2))
        assert first.embedding == second.embedding
        assert first.embedding == make_engine(prefix_cache=False).submit(request).result().embedding
        assert (second.usage.cached_tokens > 0) == (kind == "last")


@exact
@models
def test_the_mean_of_one_token_is_its_own_state(make_engine):
    vectors = [make_engine().submit(vector_of((7,), kind)).result().embedding for kind in ("last", "mean")]
    assert vectors[0] == vectors[1]
