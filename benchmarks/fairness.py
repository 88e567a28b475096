"""What a key's time to first token becomes beside another key's 1,000 queued requests.

    python benchmarks/fairness.py [--model DIR] [--prompts 20,100,300,800] [--trials 5]

Processor time of this process, one thread, so that other work on the machine does not count; the embedded
model, the engine as `bise serve` makes it, without a thread of its own. `alone` is the median time from
submit to first token on an idle engine; `crowded` the same for a request that comes between two steps while
another key has 1,000 requests queued and as many running as there are places; `in a step` adds half of a
step, the mean wait of a request that comes at any time, since a step is never interrupted. Prints one line
per prompt length, and one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from bise.engine.engine import Engine
from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.registry import resolve

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
    for length in (512, *prompts):  # warm, and the pace knows the machine's speed
        first_token_s(engine, request(rng, length, 4, "small"))
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
        crowded, half = statistics.median(found), statistics.mean(steps) / 2
        rows.append(
            {
                "prompt": length,
                "alone_ms": 1e3 * alone[length],
                "crowded_ms": 1e3 * crowded,
                "ratio": crowded / alone[length],
                "in_a_step_ratio": (crowded + half) / alone[length],
            }
        )
    waiting = engine.stats().num_waiting
    for handle in backlog:
        handle.cancel()
    loaded.close()
    if waiting < BACKLOG * 2 // 3:
        raise SystemExit(f"only {waiting} requests were still waiting at the end")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", default="20,100,300,800")
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    prompts = [int(length) for length in options.prompts.split(",")]
    rows = measure(options.model or resolve(None), prompts, options.trials)
    for row in rows:
        sys.stdout.write(
            f"prompt {row['prompt']:5.0f}: alone {row['alone_ms']:7.1f} ms, crowded {row['crowded_ms']:7.1f} "
            f"ms, x{row['ratio']:.2f}, in a step x{row['in_a_step_ratio']:.2f}\n"
        )
    sys.stdout.write(json.dumps({"fairness": rows}) + "\n")


if __name__ == "__main__":
    main()
