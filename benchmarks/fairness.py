"""What a key's time to first token becomes beside another key's 1,000 queued requests.

    python benchmarks/fairness.py [--http] [--model DIR] [--prompts 20,100,300,800] [--trials 5]

Without `--http`: processor time of this process, one thread, so that other work on the machine does not
count; the embedded model, the engine as `bise serve` makes it, without a thread of its own. `alone` is the
median time from submit to first token on an idle engine; `crowded` the same for a request that comes between
two steps while another key has 1,000 requests queued and as many running as there are places; `at any time`
adds what is left of the step in which a request comes, on average over all moments, since a step is never
interrupted.

With `--http`: what a client sees. A live `bise serve` with two keys, one of which keeps 1,000 requests open;
the other one asks now and then, streamed, at random moments. Wall clock, both threads; `alone` is the median
before the first key begins.

Prints one line per prompt length, and one JSON document last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from live_servers import LiveServer, bise_server
from serving_client import Answer, allow_connections, post, quantile, run

from bise.engine.engine import Engine
from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.registry import resolve
from bise.store.opening import Store

BACKLOG = 1000


def request(rng: random.Random, length: int, max_tokens: int, tenant: str) -> Request:
    """Return a request of random tokens that nobody has asked before."""
    return Request(
        token_ids=(1, *(rng.randrange(300, 3000) for _ in range(length - 1))),
        params=SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True),
        tenant=tenant,
        use_prefix_cache=False,
        speculate=False,
    )


def first_token_s(engine: Engine, asked: Request) -> float:
    """Return the processor time until the first token of a request; it is cancelled then."""
    began = time.process_time()
    handle = engine.submit(asked)
    next(delta for delta in handle if delta.token_ids)
    took = time.process_time() - began
    handle.cancel()
    return took


def measure(model: Path, prompts: list[int], trials: int) -> list[dict[str, float]]:
    """Return one row per prompt length, times in milliseconds."""
    rng = random.Random(0)
    loaded = load_model(model, threads=1, context=1024, max_sequences=8, threaded=False)
    engine = loaded.engine
    for length in (512, *prompts):  # warm, and the pace knows what steps cost
        engine.submit(request(rng, length, 4, "small")).result()
    alone = {
        length: statistics.median(
            first_token_s(engine, request(rng, length, 4, "small")) for _ in range(trials)
        )
        for length in prompts
    }
    backlog = [  # kept: a handle that is dropped cancels its request
        engine.submit(request(rng, rng.randrange(50, 400), rng.randrange(20, 200), "large"))
        for _ in range(BACKLOG)
    ]
    steps: list[float] = []

    def go_on(count: int) -> None:
        for _ in range(count):
            began = time.process_time()
            engine.step()
            steps.append(time.process_time() - began)

    go_on(20)
    rows: list[dict[str, float]] = []
    for length in prompts:
        found: list[float] = []
        for _ in range(trials):
            go_on(4)
            found.append(first_token_s(engine, request(rng, length, 4, "small")))
        # A long step is met by more of those who come than a short one.
        crowded, left = statistics.median(found), sum(step**2 for step in steps) / sum(steps) / 2
        rows.append(
            {
                "prompt": length,
                "alone_ms": 1e3 * alone[length],
                "crowded_ms": 1e3 * crowded,
                "ratio": crowded / alone[length],
                "any_time_ratio": (crowded + left) / alone[length],
            }
        )
    waiting = engine.stats().num_waiting
    for handle in backlog:
        handle.cancel()
    loaded.close()
    if waiting < BACKLOG * 2 // 3:
        raise SystemExit(f"only {waiting} requests were still waiting at the end")
    return rows


class Live:
    """A live server, one key that asks for much and one that asks now and then."""

    def __init__(self, server: LiveServer, keys: dict[str, str]) -> None:
        self._server, self._keys = server, keys
        self._rng = random.Random(0)

    def _request(self, key: str, length: int, max_tokens: int, *, is_streamed: bool) -> bytes:
        asked = request(self._rng, length, max_tokens, key)
        body = {
            "model": self._server.model,
            "prompt": list(asked.token_ids),
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": is_streamed,
        }
        return post(self._server.url, "/v1/completions", body, self._keys[key])

    async def first_token_s(self, length: int) -> float:
        """Return the time to the first text of a short answer."""
        await asyncio.sleep(self._rng.uniform(0.02, 0.08))
        answer = Answer(time.perf_counter())
        asked = self._request("small", length, 4, is_streamed=True)
        answer.asked = time.perf_counter()
        await run(self._server.url, asked, answer)
        if answer.first_s is None:
            raise SystemExit(f"no answer: {answer.error}")
        return answer.first_s

    async def crowd(self) -> None:
        """Ask for one long answer after the other with the other key."""
        while True:
            length, tokens = self._rng.randrange(50, 400), self._rng.randrange(20, 200)
            asked = self._request("large", length, tokens, is_streamed=False)
            answer = Answer(time.perf_counter())
            await run(self._server.url, asked, answer)
            if answer.status != 200:
                raise SystemExit(f"the backlog was refused: {answer.error}")

    async def measure(self, prompts: list[int], trials: int) -> list[dict[str, float]]:
        """Return one row per prompt length, times in milliseconds."""
        for length in (512, *prompts):
            await self.first_token_s(length)
        alone = {length: [await self.first_token_s(length) for _ in range(trials)] for length in prompts}
        tasks = [asyncio.ensure_future(self.crowd()) for _ in range(BACKLOG)]
        await asyncio.sleep(5)
        crowded = {length: [await self.first_token_s(length) for _ in range(trials)] for length in prompts}
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [
            {
                "prompt": length,
                "alone_ms": 1e3 * statistics.median(alone[length]),
                "crowded_ms": 1e3 * statistics.median(crowded[length]),
                "ratio": statistics.median(crowded[length]) / statistics.median(alone[length]),
                "p90_ratio": (quantile(crowded[length], 0.9) or 0.0) / (quantile(alone[length], 0.9) or 1.0),
            }
            for length in prompts
        ]


def measure_live(model: Path | None, prompts: list[int], trials: int) -> list[dict[str, float]]:
    """Return what a client of a live server sees."""
    allow_connections(BACKLOG)
    with tempfile.TemporaryDirectory() as directory:
        with Store.open(f"{directory}/bise.db") as store:
            keys = {name: store.keys.create(name)[1] for name in ("small", "large")}
        options = ["--db", f"{directory}/bise.db", "--require-key", "--context", "1024"]
        with bise_server(model, *options) as server:
            return asyncio.run(Live(server, keys).measure(prompts, trials))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--http", action="store_true", help="a live server, as its clients see it")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", default="20,100,300,800")
    parser.add_argument("--trials", type=int, help="requests per prompt length  [default: 5, with --http 40]")
    options = parser.parse_args()
    prompts = [int(length) for length in options.prompts.split(",")]
    if options.http:
        rows, other = measure_live(options.model, prompts, options.trials or 40), "p90_ratio"
    else:
        rows = measure(options.model or resolve(None), prompts, options.trials or 5)
        other = "any_time_ratio"
    for row in rows:
        sys.stdout.write(
            f"prompt {row['prompt']:5.0f}: alone {row['alone_ms']:7.1f} ms, crowded {row['crowded_ms']:7.1f} "
            f"ms, x{row['ratio']:.2f}, {other.removesuffix('_ratio').replace('_', ' ')} x{row[other]:.2f}\n"
        )
    sys.stdout.write(json.dumps({"fairness": rows}) + "\n")


if __name__ == "__main__":
    main()
