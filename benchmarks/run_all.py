"""Rerun every benchmark of docs/bench.md and write benchmarks/results/DATE-MACHINE.json (under 30 minutes).

    python benchmarks/run_all.py [--rounds 5] [--only NAME,...] [--out FILE] [--table]

Each entry of PLAN is one `bise bench`, in a process of its own, so that its memory is free for the next.
Peers that are not installed are skipped and named. The table at the end holds every row against its floor and
target (verdicts.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from verdicts import table, verdicts

from bise.bench.gguf_file import gguf_path
from bise.bench.suite import altered_shape
from bise.plan import known_shape

RESULTS = Path(__file__).resolve().parent / "results"

AVX2_LLAMA = Path.home() / ".cache" / "bise" / "llama-avx2"
"""A llama-cpp-python built for AVX2 alone (docs/bench.md); the run that needs it is skipped without."""

PLAN: dict[str, str] = {
    # name: arguments of `bise bench`. Fewer layers: the same work per layer, and the model's name says so.
    "7b-q4": "--shape mistral-7b --quant q4 --prompt 512 --gen 8 --batch 1,4,8,16 --vs llama.cpp:Q4_0",
    "7b-q4-2k": "--shape mistral-7b --layers 4 --quant q4 --prompt 512,2048 --gen 0"
    " --vs llama.cpp:Q4_0,llama.cpp:Q4_K_M",
    "s06-q4-deep": "--shape s06 --quant q4 --prompt , --gen 48 --context 4096 --vs llama.cpp:Q4_0",
    "window-prefill": "--shape mistral-7b --layers 1 --window 4096 --quant q4 --prompt 2048,32768 --gen 0",
    "window-decode": "--shape s06 --window 4096 --quant q4 --prompt , --gen 48 --context 4096,32768",
    "moe-q4": "--shape moe --quant q4 --prompt 512 --gen 0 --vs llama.cpp:Q4_0,llama.cpp:Q4_K_M",
    "s06-q8": "--shape s06 --quant q8 --prompt 512 --gen 0 --vs ctranslate2",
    "7b-q8": "--shape mistral-7b --layers 16 --quant q8 --prompt , --gen 16",
    "brise": "--prompt 256 --gen 96",
    "avx2": "--shape mistral-7b --layers 4 --quant q4 --prompt 512 --gen 32 --vs llama.cpp:Q4_0",
    "avx2-same-file": "FILE --quant auto --prompt 512 --gen 16 --vs llama.cpp",
}


def main() -> int:
    """Run the plan and write one file; 1 when an entry failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case")
    parser.add_argument("--only", default="", help="names of PLAN, separated by commas")
    parser.add_argument("--wait", type=float, default=5, help="seconds to wait for an idle machine per case")
    parser.add_argument("--out", type=Path, help="file to write; runs already in it are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of --out")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or list(PLAN)
    if unknown := set(names) - set(PLAN):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PLAN)}")
    out = options.out or RESULTS / f"{datetime.date.today().isoformat()}-{platform.node() or 'machine'}.json"
    document: dict = {"runs": {}, "failed": {}, "seconds": {}}
    if out.exists():
        document |= json.loads(out.read_text(encoding="utf-8"))
    started = time.monotonic()
    for name in [] if options.table else names:
        command = f"{PLAN[name]} --rounds {options.rounds} --wait {options.wait:g}"
        print(f"== {name}: bise bench {command} (at {time.monotonic() - started:.0f} s)", flush=True)
        begun = time.monotonic()
        run(name, command, document)
        document["seconds"][name] = time.monotonic() - begun
        if name == "brise":
            document["startup_s"] = startup_seconds(options.rounds)
        document["verdicts"] = verdicts(document)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # kept after every entry
    print("\n".join(table(verdicts(document))))
    print(f"{out}, {time.monotonic() - started:.0f} s")
    return 1 if document["failed"] else 0


def run(name: str, arguments: str, document: dict) -> None:
    """Run one entry; show its table, keep its document."""
    environment = dict(os.environ)
    if name.startswith("avx2"):
        if not AVX2_LLAMA.is_dir():
            document["failed"][name] = f"no llama.cpp for AVX2 at {AVX2_LLAMA}"
            print(document["failed"][name], flush=True)
            return
        paths = [str(AVX2_LLAMA), environment.get("PYTHONPATH", "")]
        environment |= {"BISE_ISA": "avx2", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [same_file() if word == "FILE" else word for word in arguments.split()]
    command = [sys.executable, "-m", "bise", "bench", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        document["failed"][name] = f"exit code {done.returncode}"
        print(f"{name} failed with exit code {done.returncode}", flush=True)
        return
    print("\n".join(lines[:-1]), flush=True)
    document["failed"].pop(name, None)
    document["runs"][name] = json.loads(lines[-1])


def same_file() -> str:
    """Return the GGUF file that llama.cpp reads in `avx2`: the same Q4_0 blocks for both engines."""
    return str(gguf_path(altered_shape(known_shape("mistral-7b"), None, 4), "Q4_0"))


def startup_seconds(runs: int) -> list[float]:
    """Return the seconds of `bise generate` for one token of the embedded model, start and exit included."""
    found: list[float] = []
    for _ in range(runs):
        started = time.perf_counter()
        command = [sys.executable, "-m", "bise", "generate", "--prompt", "The", "--max-tokens", "1"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    sys.exit(main())
