"""The gate between training and serving: what the trainer computes must be what the engine will compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.errors import EngineError
from bise.text.turns import LearnedText

BOUND = 1e-3
"""Largest difference of a log-prob in nats; float32 on both sides differs by about 1e-5."""
PROBES = 8
PROBE_TOKENS = 256


def probe_texts(texts: Sequence[LearnedText]) -> list[LearnedText]:
    """Return the beginnings of a few texts, every token to be compared."""
    cut = [text.ids[:PROBE_TOKENS] for text in texts[:PROBES]]
    return [LearnedText(ids, (False, *(True,) * (len(ids) - 1))) for ids in cut if len(ids) > 1]


def engine_logprobs(
    model: Path, adapters: Sequence[Path | None], probes: Sequence[LearnedText]
) -> list[list[float]]:
    """Return what the serving engine says of every probed token under each adapter (None: the model alone),
    float weights on the cpu backend.
    """
    loaded = load_model(model, quant="none", threaded=False)
    try:
        params = SamplingParams(max_tokens=0, temperature=0)
        found: list[list[float]] = []
        for number, adapter in enumerate(adapters):
            name = None if adapter is None else f"tuned-{number}"
            if name is not None and adapter is not None:
                loaded.load_adapter(name, adapter)
            values: list[float] = []
            for probe in probes:
                request = Request(token_ids=probe.ids, params=params, prompt_logprobs=True, adapter=name)
                completion = loaded.engine.submit(request).result()
                values += [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
            found.append(values)
            if name is not None:
                loaded.unload_adapter(name)
        return found
    finally:
        loaded.close()


def require_parity(trained: Sequence[float], served: Sequence[float]) -> float:
    """Return the largest difference of two lists of log-probs; EngineError when it exceeds `BOUND`."""
    difference = float(np.abs(np.asarray(trained, np.float64) - np.asarray(served, np.float64)).max())
    if not difference <= BOUND:
        raise EngineError(
            f"the engine's log-probs of the trained model differ from the trainer's by {difference:.2g} nats "
            f"(bound {BOUND:g}); it is not published: please report it"
        )
    return difference
