"""What the same bits cost: the engine beside itself with the rules that make them relaxed.

    python benchmarks/equality.py [--shape mistral-7b --layers 4] [--quant q4] [--rounds 7] [--out FILE]

Two builds of the native extension in turns, each in a process of its own, made here from the same sources,
everything else the same. `strict` is as it is shipped: every float sum in one fixed order, attention in
splits at absolute positions. `relaxed` is without these rules: the compiler may reorder, contract and
vectorise float sums as it likes (-ffast-math), and attention is not split at all up to 4,096 tokens. Whether
a build gives the same bits alone and in a batch, whole and in pieces, is tried and printed.

The other freedom that one gives up is a product whose kernel depends on the number of rows, as BLAS has it.
So a second table times products of float weights: the strict kernel beside OpenBLAS (numpy) at the same
shapes. Products of quantised weights have nothing to relax: their sums are of integers, exact in any order,
and their kernel does depend on the number of rows.

Prints tables and one JSON document last; the builds take some minutes and are kept in BISE_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bise.bench.peers import PeerContestant
from bise.bench.report import provenance
from bise.bench.rounds import Case, Meters, Series, busy_seconds, describe, run_rounds
from bise.config import bise_home, default_threads
from bise.kernels.cpu import CpuOps, arena, read_rate

NATIVE = Path(__file__).resolve().parent.parent / "native"
CHANGES = {
    "CMakeLists.txt": ("-ffp-contract=off", "-ffast-math -fno-finite-math-only"),
    "ops.h": ("constexpr int kSplit = 512;", "constexpr int kSplit = 4096;"),
}
"""By file: what is strict there, and what is written in its place."""
PRODUCTS = ((4096, 4096), (14336, 4096))
"""Rows and columns of the float weights whose products are timed."""


def build(kind: str, changes: dict[str, tuple[str, str]]) -> Path:
    """Return the extension with `changes`, built when it is not there or the sources are newer."""
    directory = bise_home() / "cache" / kind
    newest = max(path.stat().st_mtime for path in (*NATIVE.rglob("*"), Path(__file__)))
    built = next(directory.glob("_native*.so"), None)
    if built is not None and built.stat().st_mtime > newest:
        return built
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "native"
        shutil.copytree(NATIVE, copy)
        for name, (strict, relaxed) in changes.items():
            text = (copy / name).read_text(encoding="utf-8")
            assert text.count(strict) == 1, f"{name} does not say {strict!r} once any more"
            (copy / name).write_text(text.replace(strict, relaxed), encoding="utf-8")
        out = Path(temporary) / "build"
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        jobs = ["-j", str(default_threads())]
        make = (["cmake", "-S", str(copy), "-B", str(out), *options], ["cmake", "--build", str(out), *jobs])
        for command in make:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (library,) = out.glob("_native*.so")
        directory.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(library, directory))


def builds() -> dict[str, str]:
    """Return both extensions, built where that must be."""
    return {"strict": str(build("strict", {})), "relaxed": str(build("relaxed", CHANGES))}


def rate(series: Series) -> float:
    """Return tokens per second."""
    return series.case.tokens / series.seconds


def ratios(strict: Series, relaxed: Series) -> list[float]:
    """Return, per round, the relaxed build's speed over the strict one's."""
    return [ours.seconds / theirs.seconds for ours, theirs in zip(strict.turns, relaxed.turns, strict=True)]


def measure_builds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per case."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    shape = {name: getattr(options, name) for name in ("shape", "layers", "quant", "kv", "threads")}
    contestants = [
        PeerContestant(name, "equality_worker", {**shape, "native": native}, {}, options.kv)
        for name, native in builds().items()
    ]
    for contestant in contestants:
        print(f"{contestant.name}: {contestant.version}", flush=True)
    memory = arena(64 << 20)
    meters = Meters(
        read_rate=lambda: read_rate(memory, options.threads), busy_seconds=busy_seconds, joules=lambda: None
    )
    cases = [
        Case(op="prefill", prompt=options.context, batch=1, context=0, steps=0),
        *(
            Case(op="decode", prompt=0, batch=batch, context=options.context, steps=max(2, 16 // batch))
            for batch in (1, 16)
        ),
    ]
    rows: list[dict[str, Any]] = []
    try:
        for case in cases:
            found, skipped = run_rounds(case, contestants, options.rounds, meters)
            if skipped:
                raise SystemExit(skipped[0])
            gains = ratios(*found)
            rows.append(
                {
                    "case": describe(case),
                    **{f"{series.contestant}_tokens_per_s": rate(series) for series in found},
                    "relaxed_over_strict": statistics.median(gains),
                    "rounds": gains,
                    "foreign_cores": max(turn.foreign_cores for series in found for turn in series.turns),
                }
            )
            print(
                f"{rows[-1]['case']:<24} strict {rate(found[0]):9.2f} tok/s  relaxed {rate(found[1]):9.2f}  "
                f"relaxed/strict x{statistics.median(gains):.3f} ({min(gains):.2f} to {max(gains):.2f})",
                flush=True,
            )
    finally:
        versions = {contestant.name: contestant.version for contestant in contestants}
        for contestant in contestants:
            contestant.close()
    return [{"builds": versions}, *rows]


def best_of(call: Any, count: int) -> float:
    """Return the seconds of the fastest of `count` calls."""
    found: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def measure_products(threads: int) -> list[dict[str, Any]]:
    """Return the times of products of float32 weights, strict and by OpenBLAS, in turns."""
    ops, rng = CpuOps(threads), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for num_rows, num_columns in PRODUCTS:  # OpenBLAS takes all cores unless OPENBLAS_NUM_THREADS says less
        weight = rng.standard_normal((num_rows, num_columns), dtype=np.float32)
        packed = ops.weight(weight)
        for count in (1, 8, 16, 512):
            x = rng.standard_normal((count, num_columns), dtype=np.float32)
            turns = [
                (
                    best_of(lambda x=x, packed=packed: ops.linear(x, [packed]), 3),
                    best_of(lambda x=x, weight=weight: x @ weight.T, 3),
                )
                for _ in range(5)
            ]
            strict, blas = (min(turn[index] for turn in turns) for index in (0, 1))
            rows.append(
                {
                    "product": f"{num_rows} x {num_columns}, {count} rows",
                    "strict_ms": 1e3 * strict,
                    "openblas_ms": 1e3 * blas,
                    "relaxed_over_strict": strict / blas,
                }
            )
            print(
                f"{rows[-1]['product']:<24} strict {1e3 * strict:9.2f} ms     OpenBLAS {1e3 * blas:9.2f}  "
                f"OpenBLAS/strict x{strict / blas:.3f}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--layers", type=int, default=4, help="so many of its layers")
    parser.add_argument("--quant", default="q4", help="width of the weights")
    parser.add_argument("--kv", default="auto", help="storage of keys and values")
    parser.add_argument("--context", type=int, default=2048, help="tokens read, and held while decoding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--build-only", action="store_true", help="build, measure nothing")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    if options.build_only:
        print(builds())
        return
    document = {
        "benchmark": "equality",
        "model": f"{options.shape}, {options.layers} layers, random {options.quant} weights",
        **provenance(shlex.join(["python", *sys.argv]), options.threads, CpuOps(1).isa),
        "engine": measure_builds(options),
        "products": measure_products(options.threads),
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
