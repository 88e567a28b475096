"""Prefill and decode speed of one model on this machine, beside what its memory could give at best.

    python benchmarks/engine.py [MODEL] [--quant q4] [--prompt-tokens 512] [--tokens 64] [--repeats 3]

The last line of standard output is one JSON document: the machine, the versions, every sample. Prompts are
random tokens, different in each repeat; best and median are told. Decoding reads every active weight once per
token, so its ceiling is memory bandwidth; a model that fits the processor's cache may exceed it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from bise import __version__
from bise.cli.doctor import processor_name
from bise.engine.load import LoadedModel, load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.registry import resolve
from bise.kernels.cpu import CpuOps
from bise.model.pack import plan_packing

COPY_BYTES = 256 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    started = time.perf_counter()
    loaded = load_model(resolve(options.model), quant=options.quant, threads=options.threads)
    load_s = time.perf_counter() - started
    try:
        samples = [measure(loaded, options, seed) for seed in range(options.repeats)]
    finally:
        loaded.close()
    report = summary(loaded, options, samples) | {"load_s": load_s, "samples": samples} | provenance(options)
    tell(report)
    print(json.dumps(report))


def measure(loaded: LoadedModel, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run one request and return its prefill and decode speed in tokens per second."""
    rng = np.random.default_rng(seed)
    low = min(300, loaded.source.config.vocab_size // 2)  # past the control tokens of every family
    ids = rng.integers(low, loaded.source.config.vocab_size, options.prompt_tokens)
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    done = loaded.engine.submit(Request(token_ids=tuple(ids.tolist()), params=params)).result()
    return {
        "prefill_tok_s": options.prompt_tokens / done.timings.prefill_s,
        "decode_tok_s": (len(done.token_ids) - 1) / done.timings.decode_s,
    }


def copy_bandwidth() -> float:
    """Return the bytes per second that one thread reads while copying: a floor of the ceiling."""
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, COPY_BYTES / (time.perf_counter() - started))
    return best


def summary(
    loaded: LoadedModel, options: argparse.Namespace, samples: list[dict[str, float]]
) -> dict[str, Any]:
    """Return best and median speeds, and decode's share of the copy bandwidth."""
    weights = plan_packing(loaded.source, options.quant).size_bytes
    config = loaded.source.config
    active = weights * config.num_active_params / config.num_params
    decode = max(sample["decode_tok_s"] for sample in samples)
    return {
        "prefill_tok_s": {"best": max(s["prefill_tok_s"] for s in samples),
                          "median": statistics.median(s["prefill_tok_s"] for s in samples)},
        "decode_tok_s": {"best": decode, "median": statistics.median(s["decode_tok_s"] for s in samples)},
        "weight_bytes": weights,
        "decode_bytes_s": decode * active,
        "copy_bytes_s": copy_bandwidth(),
    }  # fmt: skip


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Return where and with what this was measured."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    ops = CpuOps(options.threads or 1)
    return {
        "bise": __version__,
        "commit": git.stdout.strip() or None,
        "machine": processor_name(),
        "isa": ops.isa,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "options": vars(options),
    }


def tell(report: dict[str, Any]) -> None:
    """Print the numbers for a person."""
    print(f"machine   {report['machine']}, {report['isa']}, commit {report['commit']}")
    print(f"load      {report['load_s']:.2f} s, weights {report['weight_bytes'] / 1e6:.1f} MB")
    for name in ("prefill", "decode"):
        speed = report[f"{name}_tok_s"]
        print(f"{name:9} {speed['best']:.1f} tok/s best, {speed['median']:.1f} median")
    share = report["decode_bytes_s"] / report["copy_bytes_s"]
    read = report["decode_bytes_s"] / 1e9
    print(f"ceiling   decode reads {read:.2f} GB/s, {share:.0%} of one thread's copy speed")


if __name__ == "__main__":
    main()
