"""bise in a process of its own with a given build of the native extension; see equality.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import bise
from bise.bench.rounds import Case
from bise.bench.worker import serve


class Build:
    """The engine over one shape, with the extension in `options["native"]`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        _take(options["native"])
        from bise.bench.engine_bench import BiseContestant
        from bise.plan import known_shape, shape_source

        source, layers = known_shape(options["shape"]), int(options["layers"])
        config = replace(source.config, num_layers=layers, windows=source.config.windows[:layers])
        source = shape_source(f"{options['shape']}-{layers}", config)
        self._engine = BiseContestant(
            source, quant=options["quant"], kv=options["kv"], threads=options["threads"]
        )
        self.version = "the same bits" if _is_equal(options["kv"]) else "other bits"

    def prepare(self, case: Case, rounds: int) -> None:
        """See `Contestant.prepare`."""
        self._engine.prepare(case, rounds)

    def run(self) -> float:
        """See `Contestant.run`."""
        return self._engine.run()

    def release(self) -> None:
        """See `Contestant.release`."""
        self._engine.release()


def _take(path: str) -> None:
    """Have `bise._native` be the extension at `path`."""
    spec = importlib.util.spec_from_file_location("bise._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["bise._native"] = module
    bise._native = module  # pyright: ignore[reportAttributeAccessIssue]


def _is_equal(kv: str) -> bool:
    """Return whether texts get the same log-probs alone and all together, read whole and in pieces."""
    from bise.engine.engine import Engine
    from bise.engine.request import Request, SamplingParams
    from bise.hub.embedded import embedded_path
    from bise.kernels.cpu import CpuOps
    from bise.model.checkpoint import open_model
    from bise.model.packed import load_packed
    from bise.model.transformer import Transformer

    ops = CpuOps(1)
    source = open_model(embedded_path())
    model = Transformer(source.config, load_packed(source, "auto", ops)[0].weights(ops), ops)
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=2, ignore_eos=True)
    requests = [
        Request(token_ids=tuple(range(300 + length, 300 + 2 * length)), params=params)
        for length in (3, 40, 333, 700)
    ]

    def engine(max_step_tokens: int) -> Engine:
        return Engine(
            model, ops, config=source.config, tokenizer=None, kv_format="q16" if kv == "auto" else kv,
            num_blocks=128, max_step_tokens=max_step_tokens, prefix_cache=False, threaded=False,
        )  # fmt: skip

    with engine(1024) as whole, engine(48) as pieces:
        alone = [whole.submit(request).result().logprobs for request in requests]
        handles = [pieces.submit(request) for request in requests]
        return [handle.result().logprobs for handle in handles] == alone


if __name__ == "__main__":
    serve(Build)
