"""Rerun every benchmark of docs/bench.md and write benchmarks/results/DATE-MACHINE.json (under 30 minutes).

    python benchmarks/run_all.py [--rounds 5] [--only NAME,...] [--out FILE]

Each entry of PLAN is one `bise bench`, in a process of its own, so that its memory is free for the next.
Peers that are not installed are skipped and named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

PLAN: dict[str, tuple[str, int]] = {
    # name: (arguments of `bise bench`, rounds at most); short and important ones first
    "7b-q4": (
        "--shape mistral-7b --quant q4 --prompt 512,2048 --gen 12 --batch 1,4,8,16 --vs llama.cpp:Q4_0", 5),
    "s06-q8": (
        "--shape s06 --quant q8 --prompt 512 --gen 48 --vs ctranslate2,transformers,llama.cpp:Q8_0", 5),
    "s06-q4": ("--shape s06 --quant q4 --prompt 512 --gen 64 --vs llama.cpp:Q4_0,llama.cpp:Q4_K_M", 5),
    "moe-q4": ("--shape moe --quant q4 --prompt 512 --gen 64 --vs llama.cpp:Q4_0,llama.cpp:Q4_K_M", 5),
    "s06-q4-deep": (
        "--shape s06 --quant q4 --prompt , --gen 48 --context 4096 --vs llama.cpp:Q4_0", 5),
    "7b-q8": ("--shape mistral-7b --quant q8 --prompt 512 --gen 16", 5),
    "s06-q4-window-2k": ("--shape s06 --quant q4 --window 4096 --prompt 2048 --gen 48 --context 4096", 5),
    "s06-q4-window-32k": ("--shape s06 --quant q4 --window 4096 --prompt 32768 --gen 48 --context 32768", 1),
    "brise": ("--prompt 256 --gen 256", 5),
}  # fmt: skip


def main() -> int:
    """Run the plan and write one file; 1 when an entry failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case, at most")
    parser.add_argument("--only", default="", help="names of PLAN, separated by commas")
    parser.add_argument("--wait", type=float, default=5, help="seconds to wait for an idle machine per case")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or list(PLAN)
    if unknown := set(names) - set(PLAN):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PLAN)}")
    out = options.out or RESULTS / f"{datetime.date.today().isoformat()}-{platform.node() or 'machine'}.json"
    document: dict[str, object] = {"runs": {}, "failed": {}, "startup_s": startup_seconds()}
    started = time.monotonic()
    for name in names:
        arguments, most = PLAN[name]
        command = f"{arguments} --rounds {min(most, options.rounds)} --wait {options.wait:g}"
        print(f"== {name}: bise bench {command} (at {time.monotonic() - started:.0f} s)", flush=True)
        run(name, command, document)
        document["seconds"] = time.monotonic() - started
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # kept after every entry
    print(f"wrote {out} after {time.monotonic() - started:.0f} s")
    return 1 if document["failed"] else 0


def run(name: str, arguments: str, document: dict) -> None:
    """Run one entry; show its table, keep its document."""
    command = [sys.executable, "-m", "bise", "bench", *arguments.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        document["failed"][name] = f"exit code {done.returncode}"
        print(f"{name} failed with exit code {done.returncode}", flush=True)
        return
    print("\n".join(lines[:-1]), flush=True)
    document["runs"][name] = json.loads(lines[-1])


def startup_seconds(runs: int = 3) -> list[float]:
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
