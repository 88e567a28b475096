"""A draft model behind the API: the same answers, in fewer steps; the plan counts it before it is loaded."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import pytest
from openai import OpenAI

from bise.engine.fleet import Fleet
from bise.engine.model_spec import ModelSpec, plan_model

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
real = importlib.import_module("test_fleet_models")
guessing = importlib.import_module("test_draft_model")
sys.path.pop(0)


@pytest.fixture
def base(tmp_path):
    return real.sized.write(tmp_path, real.SIZE)


def complete(server, temperature: float) -> tuple:
    with OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        answer = client.completions.create(
            model="a", prompt="some words", max_tokens=41, temperature=temperature, seed=3, logprobs=2,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    return answer.choices[0].text, answer.choices[0].logprobs, answer.usage.completion_tokens


def test_a_draft_model_changes_the_number_of_steps_and_nothing_else(base, serve):
    plain = serve(Fleet([ModelSpec(name="a", path=base, threads=1)]))
    drafted = serve(Fleet([ModelSpec(name="a", path=base, threads=1, draft=base)]))
    expected = [complete(plain, temperature) for temperature in (0, 1.0)]
    assert expected[0][2] == 41
    assert expected[0][0] != expected[1][0]
    assert [complete(drafted, temperature) for temperature in (0, 1.0)] == expected
    lease = drafted.fleet.acquire("a")
    speculation = lease.loaded.engine.speculation
    for temperature, answer in zip((0, 1.0), expected, strict=True):
        speculation.forget(guessing.ModelOnly())
        assert complete(drafted, temperature) == answer
        until = time.monotonic() + 20
        while speculation.stats.num_steps < 8:  # the last step is counted after its tokens were told
            assert time.monotonic() < until
        assert (speculation.stats.num_accepted, speculation.stats.num_steps) == (32, 8)
    lease.release()


def test_the_plan_of_a_served_model_counts_its_draft_model(base):
    alone = plan_model(ModelSpec(name="a", path=base, context=256, sequences=2), None)
    both = plan_model(ModelSpec(name="a", path=base, context=256, sequences=2, draft=base), None)
    assert both.size_bytes > alone.size_bytes + alone.weight_bytes
    assert both.weight_bytes == 2 * alone.weight_bytes


def test_a_draft_model_of_another_vocabulary_is_told_before_any_request(base):
    with Fleet([ModelSpec(name="a", path=base, draft=guessing.resolve(None))]) as fleet:
        fault = fleet.card("a").fault
    assert fault is not None
    assert "cannot guess for this model, their vocabularies differ: its size is" in fault
