"""How fast the compared shapes decode in bise's engine: what fewer key heads, a window and experts are for.

    python recipes/ablations/decode.py recipes/ablations/results/small

The trained models are so small that a step costs more than its keys, so the same variants are measured at a
width where memory decides: random weights, as speed does not depend on values. Writes decode.json, which
report.py reads. Measure on a quiet machine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from ablate import Size, variants

from bise.bench.engine_bench import BiseContestant
from bise.bench.rounds import Case
from bise.config import default_threads
from bise.plan import shape_source

SIZE = Size(1024, 4, 16, 64, 2816, 1, 1)
WINDOW = 1024
DEPTHS = (512, 8192)
ROUNDS = 25
STEPS = 12


def held_bytes(contestant: BiseContestant) -> float:
    """Return the KV memory that the running sequence holds, by the engine's own count of blocks."""
    assert contestant._engine is not None
    stats = contestant._engine.stats()
    held = sum(stats.num_blocks) - sum(stats.num_free_blocks)
    return stats.kv_bytes * held / sum(stats.num_blocks)


def main() -> None:
    """Measure, the models taking turns, so that what disturbs one round disturbs that of each."""
    threads = default_threads()
    models = variants(SIZE)
    models["window"] = replace(models["gqa"], windows=(WINDOW,) * SIZE.layers)
    contestants = {
        name: BiseContestant(shape_source(name, config), quant="q4", kv="auto", threads=threads)
        for name, config in models.items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for depth in DEPTHS:
        case = Case(op="decode", prompt=0, batch=1, context=depth, steps=STEPS)
        for name, contestant in contestants.items():
            contestant.prepare(case, ROUNDS)
            found[name][f"held at {depth}"] = held_bytes(contestant)
        rounds = [[contestant.run() for contestant in contestants.values()] for _ in range(ROUNDS)]
        for (name, contestant), seconds in zip(contestants.items(), zip(*rounds, strict=True), strict=True):
            found[name][str(depth)] = STEPS / min(seconds)
            contestant.release()
            print(f"{name} at {depth}: {STEPS / min(seconds):.1f} tok/s", flush=True)
    last = str(DEPTHS[-1])
    window = [
        {"speed": found[name][last], "held": found[name][f"held at {last}"]} for name in ("window", "gqa")
    ]
    result = {
        "depths": DEPTHS,
        "models": found,
        "what": f"bise's engine, {threads} threads, one sequence, best of {ROUNDS} rounds of {STEPS} steps; "
        f"random 4-bit weights of {SIZE.layers} layers, width {SIZE.dim}, {SIZE.heads} heads of "
        f"{SIZE.head_dim} ({SIZE.kv_heads} of keys in `gqa`), hidden {SIZE.hidden}.",
        "window": f"In the engine at {DEPTHS[-1]:,} tokens, shape as above, with a window of {WINDOW:,}: "
        f"{window[0]['speed']:.1f} tok/s and {window[0]['held'] / 1e6:.1f} MB of keys and values, without "
        f"{window[1]['speed']:.1f} tok/s and {window[1]['held'] / 1e6:.1f} MB.",
    }
    (Path(sys.argv[1]) / "decode.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
