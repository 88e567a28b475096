"""How many requests a loaded model runs at once."""

from bise.engine.load import SEATS, load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.embedded import embedded_path


def test_more_short_requests_run_at_once_than_full_contexts_were_planned_for():
    loaded = load_model(embedded_path(), context=256, max_sequences=6, threads=1, threaded=False)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for number in range(20):
        loaded.engine.submit(Request(token_ids=(1, 300 + number), params=params))
    loaded.engine.step()
    assert loaded.engine.stats().num_running == 6 * SEATS > 6
    loaded.close()
