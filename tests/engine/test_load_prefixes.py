"""Loading with a directory for cached prefixes: the second start finds what the first one read."""

from dataclasses import replace

from bise.engine.load import load_model
from bise.engine.model_spec import ModelSpec, load_planned, plan_model
from bise.engine.request import Request, SamplingParams
from bise.hub.embedded import embedded_path


def test_a_model_loaded_again_finds_its_prefixes(tmp_path):
    request = Request(
        token_ids=tuple(range(300, 400)), params=SamplingParams(max_tokens=4, seed=1, logprobs=1)
    )
    found = []
    for _ in range(2):
        loaded = load_model(
            embedded_path(), context=512, threads=1, threaded=False, prefix_cache_dir=tmp_path / "kv"
        )
        found.append(loaded.engine.submit(request).result())
        loaded.close()
    first, second = found
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 96)
    assert (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)


def test_a_fleet_loads_with_the_prefixes_and_the_swap_of_its_spec(tmp_path):
    spec = ModelSpec(
        name="brise",
        path=embedded_path(),
        context=256,
        threads=1,
        prefix_cache_dir=tmp_path,
        swap_bytes=1 << 20,
    )
    plan = plan_model(spec, None)
    assert plan.size_bytes == plan_model(replace(spec, swap_bytes=0), None).size_bytes + (1 << 20)
    loaded = load_planned(spec, plan)
    loaded.engine.submit(
        Request(token_ids=tuple(range(300, 400)), params=SamplingParams(max_tokens=1))
    ).result()
    loaded.close()
    assert list(tmp_path.iterdir())
