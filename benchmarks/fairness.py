"""What a key's time to first token becomes beside another key's 1,000 queued requests.

    python benchmarks/fairness.py [--any-time | --http] [--model DIR] [--prompts 20,100,300,800]

The embedded model, the engine as `bise serve` makes it. `alone` is the median time from submit to first token
on an idle engine; `crowded` the same while another key has 1,000 requests queued and as many running as there
are places.

As it comes: processor time of this process, one thread, so that other work on the machine does not count, the
engine without a thread of its own; the request comes between two steps. `--any-time`: wall clock, the engine
with its thread; the request comes at a random moment, which is mostly within a step. `--http`: what a client
sees; a live `bise serve` with two keys, one of which keeps 1,000 requests open from a process of its own; the
other one asks now and then, streamed, at random moments: `arriving` while the 1,000, which ask all at once,
are still being let in, `crowded` once they wait in the engine.

Prints one line per prompt length, and one JSON document last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from live_servers import LiveServer, bise_server
from serving_client import Answer, allow_connections, post, quantile, run

from bise.bench.report import provenance
from bise.engine.engine import Engine
from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.registry import resolve
from bise.store.opening import Store

BACKLOG = 1000
Times = dict[int, list[float]]
"""Seconds to the first token, by the length of the prompt."""


def request(rng: random.Random, length: int, max_tokens: int, tenant: str) -> Request:
    """Return a request of random tokens that nobody has asked before."""
    return Request(
        token_ids=(1, *(rng.randrange(300, 3000) for _ in range(length - 1))),
        params=SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True),
        tenant=tenant,
        use_prefix_cache=False,
        speculate=False,
    )


def first_token_s(engine: Engine, asked: Request, clock: Callable[[], float]) -> float:
    """Return the time until the first token of a request; it is cancelled then."""
    began = clock()
    handle = engine.submit(asked)
    next(delta for delta in handle if delta.token_ids)
    took = clock() - began
    handle.cancel()
    return took


def measure(model: Path, prompts: list[int], trials: int, *, is_threaded: bool) -> list[dict[str, float]]:
    """Return one row per prompt length, times in milliseconds."""
    rng = random.Random(0)
    loaded = load_model(model, threads=1, context=1024, max_sequences=8, threaded=is_threaded)
    engine = loaded.engine
    clock = time.perf_counter if is_threaded else time.process_time

    def pause() -> None:
        if is_threaded:
            time.sleep(rng.uniform(0.05, 0.15))
        else:
            for _ in range(4):
                engine.step()

    def times(length: int) -> list[float]:
        found: list[float] = []
        for _ in range(trials):
            pause()
            found.append(first_token_s(engine, request(rng, length, 4, "small"), clock))
        return found

    for length in (512, *prompts):  # warm, and the pace knows what steps cost
        engine.submit(request(rng, length, 4, "small")).result()
    alone = {length: times(length) for length in prompts}
    backlog = [  # kept: a handle that is dropped cancels its request
        engine.submit(request(rng, rng.randrange(50, 400), rng.randrange(20, 200), "large"))
        for _ in range(BACKLOG)
    ]
    for _ in range(10):
        pause()
    crowded = {length: times(length) for length in prompts}
    waiting = engine.stats().num_waiting
    for handle in backlog:
        handle.cancel()
    loaded.close()
    if waiting < BACKLOG // 3:
        raise SystemExit(f"only {waiting} requests were still waiting at the end")
    return rows_of(alone, crowded=crowded)


def rows_of(alone: Times, **others: Times) -> list[dict[str, float]]:
    """Return one row per prompt length, times in milliseconds."""
    rows: list[dict[str, float]] = []
    for length, own in alone.items():
        row = {"prompt": float(length), "alone_ms": 1e3 * statistics.median(own)}
        for name, times in others.items():
            if not times[length]:
                continue
            beside = times[length]
            row |= {
                f"{name}_ms": 1e3 * statistics.median(beside),
                f"{name}_ratio": statistics.median(beside) / statistics.median(own),
                f"{name}_mean_ratio": statistics.mean(beside) / statistics.mean(own),
                f"{name}_p90_ratio": (quantile(beside, 0.9) or 0.0) / (quantile(own, 0.9) or 1.0),
            }
        rows.append(row)
    return rows


def asked_bytes(
    rng: random.Random, server: tuple[str, str], key: str, length: int, max_tokens: int, *, is_streamed: bool
) -> bytes:
    """Return the bytes of a request to `server`, its URL and model."""
    url, model = server
    body = {
        "model": model,
        "prompt": list(request(rng, length, max_tokens, "").token_ids),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": is_streamed,
    }
    return post(url, "/v1/completions", body, key)


def crowd(server: tuple[str, str], key: str) -> None:
    """Keep BACKLOG requests open, each one a long answer after the other; until this process is ended."""

    async def ask_on(rng: random.Random) -> None:
        while True:
            length, tokens = rng.randrange(50, 400), rng.randrange(20, 200)
            answer = Answer(time.perf_counter())
            await run(server[0], asked_bytes(rng, server, key, length, tokens, is_streamed=False), answer)
            if answer.status != 200:
                raise SystemExit(f"the backlog was refused: {answer.error}")

    async def ask_all() -> None:
        await asyncio.gather(*(ask_on(random.Random(seed)) for seed in range(BACKLOG)))

    allow_connections(BACKLOG)
    asyncio.run(ask_all())


class Live:
    """A live server, one key that asks for much and one that asks now and then."""

    def __init__(self, server: LiveServer, keys: dict[str, str]) -> None:
        self._server, self._keys = (server.url, server.model), keys
        self._rng = random.Random(0)

    async def first_token_s(self, length: int) -> float:
        """Return the time to the first text of a short answer."""
        await asyncio.sleep(self._rng.uniform(0.02, 0.08))
        asked = asked_bytes(self._rng, self._server, self._keys["small"], length, 4, is_streamed=True)
        answer = Answer(time.perf_counter())
        await run(self._server[0], asked, answer)
        if answer.first_s is None:
            raise SystemExit(f"no answer: {answer.error}")
        return answer.first_s

    async def _times(self, prompts: list[int], trials: int) -> Times:
        times: Times = {length: [] for length in prompts}
        for _ in range(trials):
            for length in prompts:  # in turns: what comes and goes on the machine meets all of them
                times[length].append(await self.first_token_s(length))
        return times

    def _num_waiting(self) -> int:
        """Return how many requests wait in the engine."""
        asked = urllib.request.Request(
            f"{self._server[0]}/metrics", headers={"authorization": f"Bearer {self._keys['metrics']}"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return int(
            sum(float(line.split()[-1]) for line in lines if line.startswith("bise_waiting_requests{"))
        )

    async def _times_arriving(self, prompts: list[int], others: BaseProcess) -> Times:
        """Return times measured from the moment the backlog is asked for until all of it waits."""
        times: Times = {length: [] for length in prompts}
        while (waiting := await asyncio.to_thread(self._num_waiting)) < 40:
            await asyncio.sleep(0.01)
        while waiting < BACKLOG - 40:
            for length in prompts:
                times[length].append(await self.first_token_s(length))
            if others.exitcode is not None:
                raise SystemExit("the process that asks for the backlog has ended")
            waiting = await asyncio.to_thread(self._num_waiting)
        return times

    async def measure(self, prompts: list[int], trials: int) -> list[dict[str, float]]:
        """Return one row per prompt length, times in milliseconds."""
        for length in (512, *prompts):
            await self.first_token_s(length)
        alone = await self._times(prompts, trials)
        others = get_context("spawn").Process(
            target=crowd, args=(self._server, self._keys["large"]), daemon=True
        )
        others.start()
        try:
            arriving = await self._times_arriving(prompts, others)
            crowded = await self._times(prompts, trials)
            if others.exitcode is not None or await asyncio.to_thread(self._num_waiting) < BACKLOG - 100:
                raise SystemExit("the backlog was gone before the end")
        finally:
            others.terminate()
            others.join()
        return rows_of(alone, arriving=arriving, crowded=crowded)


def measure_live(model: Path | None, prompts: list[int], trials: int) -> list[dict[str, float]]:
    """Return what a client of a live server sees."""
    with tempfile.TemporaryDirectory() as directory:
        with Store.open(f"{directory}/bise.db") as store:
            keys = {
                name: store.keys.create(name, scopes=[scope])[1]
                for name, scope in (("small", "inference"), ("large", "inference"), ("metrics", "metrics"))
            }
        options = ["--db", f"{directory}/bise.db", "--require-key", "--context", "1024"]
        with bise_server(model, *options) as server:
            return asyncio.run(Live(server, keys).measure(prompts, trials))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--any-time", action="store_true", help="requests that come within steps")
    kinds.add_argument("--http", action="store_true", help="a live server, as its clients see it")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", default="20,100,300,800")
    parser.add_argument("--trials", type=int, default=40, help="requests per prompt length  [default: 40]")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    prompts = [int(length) for length in options.prompts.split(",")]
    if options.http:
        rows = measure_live(options.model, prompts, options.trials)
    else:
        model = options.model or resolve(None)
        rows = measure(model, prompts, options.trials, is_threaded=options.any_time)
    for row in rows:
        text = f"prompt {row['prompt']:5.0f}: alone {row['alone_ms']:7.1f} ms"
        for name in ("arriving", "crowded"):
            if f"{name}_ms" in row:
                text += (
                    f"; {name} {row[f'{name}_ms']:7.1f} ms, x{row[f'{name}_ratio']:.2f}, mean "
                    f"x{row[f'{name}_mean_ratio']:.2f}, p90 x{row[f'{name}_p90_ratio']:.2f}"
                )
        sys.stdout.write(f"{text}\n")
    document = {
        "benchmark": "fairness",
        **provenance(shlex.join(["python", *sys.argv]), 1, ""),
        "fairness": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
