"""A draft model from a file: the embedded model guesses for itself, and another vocabulary is refused."""

import json
import shutil

import pytest

pytest.importorskip("bise._native", reason="the native extension is not built")

from bise.engine import load
from bise.engine.load import DraftSource, load_model, load_text
from bise.engine.memory import checked_kv_format, memory_need
from bise.engine.payoff import Payoff
from bise.engine.request import Request, SamplingParams
from bise.errors import ConfigError, MemoryPlanError
from bise.hub.registry import resolve
from bise.model.checkpoint import open_model


class ModelOnly(Payoff):
    """Takes up to four guesses of the draft model at every step, and none that were found."""

    def wants(self, num_sequences: int, lanes=()) -> bool:
        return True

    def choose(self, chances, lane=None) -> tuple[list[int], float]:
        if lane is None:
            return [0] * len(chances), 1.0
        return [min(4, len(row)) for row in chances], 2.0


@pytest.fixture(scope="module")
def loaded():
    model = load_model(resolve(None), threads=1, context=128, threaded=False, draft=resolve(None))
    yield model
    model.close()


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_model_that_guesses_for_itself_is_always_right(loaded, temperature):
    prompt = (1, *loaded.tokenizer.encode("Once upon a time"))
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=41, ignore_eos=True, logprobs=1)
    plain = loaded.engine.submit(Request(token_ids=prompt, params=params, speculate=False)).result()
    loaded.engine.speculation.forget(ModelOnly())
    found = loaded.engine.submit(Request(token_ids=prompt, params=params)).result()
    assert (found.token_ids, found.text, found.logprobs) == (plain.token_ids, plain.text, plain.logprobs)
    stats = loaded.engine.speculation.stats
    assert (stats.num_drafted, stats.num_accepted, stats.num_steps) == (32, 32, 8)


def test_a_model_with_another_vocabulary_is_refused_in_one_line(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(resolve(None), other)
    document = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    first, second = list(vocab)[300], list(vocab)[304]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"other cannot guess .*: token 300 is b.*same vocabulary"
    ) as caught:
        load_model(resolve(None), threads=1, context=128, threaded=False, draft=other)
    assert "\n" not in str(caught.value)


def test_the_plan_counts_the_draft_models_weights_keys_and_values(monkeypatch):
    path = resolve(None)
    source = open_model(path)
    guessing = DraftSource.open(path, load_text(source)[0])
    own = memory_need(source, "auto", context=128, kv_format=checked_kv_format("auto", "auto"))
    enough = own.weights + own.kv + own.scratch + guessing.weight_bytes + guessing.working_bytes(128, 1)
    assert guessing.working_bytes(128, 1) > own.kv
    monkeypatch.setattr(load, "available_memory", lambda: enough)
    load_model(path, threads=1, context=128, threaded=False, draft=path).close()
    monkeypatch.setattr(load, "available_memory", lambda: enough - 1)
    with pytest.raises(MemoryPlanError, match="a context of 128 tokens needs"):
        load_model(path, threads=1, context=128, threaded=False, draft=path)
