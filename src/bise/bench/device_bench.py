"""The engine on a device that torch drives, timed: every number beside what the device's memory allows.

Weights are loaded as for any other verb, so what is measured is what a user gets: splits between device and
RAM, recorded steps, tokens chosen on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bise.bench.rounds import Case
from bise.bench.suite import BenchOptions
from bise.engine.device import measure_rates, require_device
from bise.engine.handle import RequestHandle
from bise.engine.load import LoadedModel, load_model
from bise.engine.placement import Placement
from bise.engine.request import Delta, Request, SamplingParams
from bise.engine.split import Rates, Sizes, Split
from bise.errors import EngineError

COLUMNS = ("OP", "PROMPT", "BATCH", "CONTEXT", "TOK/S", "OF LIMIT", "ROUNDS")


def run_device_bench(
    path: Path, placement: Placement, options: BenchOptions, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure every case of a model on a device; returns the document without its provenance.

    Raises ConfigError where the device is absent, MemoryPlanError where the model does not fit it.
    """
    require_device(placement)
    cases = options.cases()
    loaded = load_model(
        path,
        quant=options.quant,
        kv=options.kv,
        threads=options.threads,
        context=max((_context(case, options.rounds) for case in cases), default=1),
        max_sequences=max(options.batches),
        threaded=False,
        placement=placement,
    )
    try:
        loaded.engine.speculation = None  # a token a step: guesses would measure the text
        tell("weights are ready")
        for note in loaded.notes:
            tell(f"note: {note}")
        rates = measure_rates(placement, options.threads)
        sizes = Sizes(loaded.source, options.quant, placement, loaded.kv)
        split = loaded.split or Split()
        results: list[dict[str, Any]] = []
        for case in cases:
            results.append(_result(_Timed(loaded, case), options.rounds, sizes, split, rates))
            tell(f"{case.op}: {results[-1]['tokens_per_s']:.1f} tok/s")
    finally:
        loaded.close()
    return {
        "model": loaded.source.name or str(path),
        "quant": options.quant,
        "kv": loaded.kv,
        "device": placement.device,
        "dtype": placement.compute_format,
        "split": split.mode,
        "limits": {
            "device_gb_per_s": rates.device_bytes_s / 1e9,
            "bus_gb_per_s": rates.bus_bytes_s / 1e9,
            "read_gb_per_s": rates.host_bytes_s / 1e9,
        },
        "results": results,
    }


def table_rows(document: dict[str, Any]) -> list[list[str]]:
    """Return the results as cells under `COLUMNS`."""
    return [
        [
            entry["op"],
            str(entry["prompt"] or "-"),
            str(entry["batch"]),
            str(entry["context"] or "-"),
            f"{entry['tokens_per_s']:.1f}",
            "-" if entry["share_of_limit"] is None else f"{entry['share_of_limit']:.0%}",
            str(entry["rounds"]),
        ]
        for entry in document["results"]
    ]


def _context(case: Case, rounds: int) -> int:
    """Return the tokens of the longest sequence of a case: some decode already while the last one is read."""
    return case.prompt + 1 if case.op == "prefill" else case.context + case.steps * (rounds + 2) + 64


def _result(timed: _Timed, rounds: int, sizes: Sizes, split: Split, rates: Rates) -> dict[str, Any]:
    """Return one entry of `results`: the median of the rounds; of prompts no limit is told."""
    case = timed.case
    timed.prepare()
    try:
        timed.run()  # kernels are compiled, memory is taken
        times = [timed.run() for _ in range(rounds)]
    finally:
        timed.release()
    seconds = median(times)
    share = None
    if case.op == "decode":
        share = case.steps * sizes.decode_seconds(split, case.context, rates, case.batch) / seconds
    return {
        **asdict(case),
        "tokens_per_s": case.tokens / seconds,
        "share_of_limit": share,
        "rounds": rounds,
        "tokens_per_s_rounds": [case.tokens / each for each in times],
    }


class _Timed:
    """One case on an engine that is stepped by hand."""

    def __init__(self, loaded: LoadedModel, case: Case) -> None:
        self.case = case
        self._loaded = loaded
        self._running: list[Iterator[Delta]] = []
        """Who lets one go cancels its request."""
        self._seed = 0

    def prepare(self) -> None:
        """For decoding, read the prompts of all sequences."""
        if self.case.op == "decode":
            handles = [self._submit(self.case.context, None) for _ in range(self.case.batch)]
            self._running = [iter(handle) for handle in handles]
            for deltas in self._running:
                _check(next(deltas))

    def run(self) -> float:
        """Read one prompt up to its first token, or take the case's steps with every sequence; tokens are on
        the host when a step ends, so nothing is left under way.
        """
        engine = self._loaded.engine
        began = perf_counter()
        if self.case.op == "prefill":
            self._submit(self.case.prompt, 1).result()
            return perf_counter() - began
        for _ in range(self.case.steps):
            engine.step()
        seconds = perf_counter() - began
        if engine.stats().num_running != self.case.batch:
            raise EngineError("a sequence ended while it was measured")
        return seconds

    def release(self) -> None:
        """Let the sequences go."""
        self._running = []
        while self._loaded.engine.step():
            pass

    def _submit(self, num_tokens: int, max_tokens: int | None) -> RequestHandle:
        self._seed += 1  # no prompt begins as another one: nothing is found in the prefix cache
        seed = (self._seed, num_tokens, self.case.batch)
        ids = np.random.default_rng(seed).integers(0, self._loaded.source.config.vocab_size, num_tokens)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return self._loaded.engine.submit(Request(token_ids=tuple(ids.tolist()), params=params))


def _check(delta: Delta) -> None:
    if delta.error is not None:
        raise delta.error
