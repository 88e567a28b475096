"""Serving under load: a chat-like trace at rising concurrency or rates, beside llama.cpp with parallel slots.

    python benchmarks/serving.py --shape mistral-7b --vs Q4_0 --streams 1,4,8,16 --rates 0.05,0.1 --out FILE

Closed loop (`--streams`): so many conversations at once, the next turn follows the answer. Open loop
(`--rates`): conversations arrive at so many per second. Both contestants are stepped by the same loop and the
same clock, in processes of their own, one after the other at each load.

`--model PATH` takes a model of bise's in place of a shape; llama.cpp gets random weights of its shape (speed
depends on bytes, not on values). Greedy, fixed answer lengths; guessing ahead is off.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from serving_trace import Conversation, Event, Job, Trace

STEP_SECONDS = 0.5
THINK_S = 2.0
"""Open loop: pause between an answer and the next turn."""


class Server(Protocol):
    """What is measured."""

    version: str
    cached_tokens: int
    outputs: dict[int, list[int]]

    @property
    def has_work(self) -> bool: ...
    def submit(self, job: Job) -> None: ...
    def step(self) -> list[Event]: ...
    def forget(self) -> None: ...


class BiseServer:
    """The engine, stepped by hand."""

    def __init__(self, options: argparse.Namespace, slots: int, context: int) -> None:
        import bise
        from bise.bench.synthetic import random_weights
        from bise.engine.engine import Engine
        from bise.engine.memory import STEP_TOKENS, checked_kv_format, kv_bytes
        from bise.engine.pace import Pace
        from bise.kernels.cpu import CpuOps
        from bise.model.packed import load_packed
        from bise.model.transformer import Transformer

        source = open_source(options)
        ops = CpuOps(options.threads)
        if source.kind == "shape":
            packed = random_weights(source, options.quant, ops)
        else:
            packed, _ = load_packed(source, options.quant, ops)
        transformer = Transformer(source.config, packed.weights(ops), ops)
        kv_format = checked_kv_format(options.kv, options.quant)
        context = min(context, source.config.max_context)
        self.version = f"bise {bise.__version__}"
        self.cached_tokens = 0
        self.outputs: dict[int, list[int]] = {}
        self._handles: dict[int, Any] = {}

        def make() -> Engine:
            return Engine(
                transformer,
                ops,
                config=source.config,
                tokenizer=None,
                kv_format=kv_format,
                kv_memory_bytes=kv_bytes(source.config, context, kv_format, slots),
                max_context=context,
                max_step_tokens=STEP_TOKENS,
                max_sequences=slots,
                pace=Pace(options.step_seconds) if options.step_seconds else None,
                threaded=False,
            )

        self._make = make
        self._engine = make()

    @property
    def has_work(self) -> bool:
        """True while anything waits or runs."""
        return bool(self._handles)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        from bise.engine.request import Request, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=job.num_output, ignore_eos=True)
        handle = self._engine.submit(Request(token_ids=job.prompt, params=params))
        self.outputs[job.number] = []
        events: list[Event] = []

        def push(delta: Any) -> None:
            if delta.error is not None:
                raise delta.error
            self.outputs[job.number] += delta.token_ids
            is_last = delta.finish_reason is not None
            if is_last:
                self.cached_tokens += delta.usage.cached_tokens
            events.append(Event(job.number, len(delta.token_ids), is_last))

        handle.push = push
        self._handles[job.number] = events

    def step(self) -> list[Event]:
        """Run one step; returns what it produced."""
        self._engine.step()
        found: list[Event] = []
        for number, events in list(self._handles.items()):
            found += events
            if events and events[-1].is_last:
                del self._handles[number]
            events.clear()
        return found

    def forget(self) -> None:
        """Start with an empty cache."""
        self._engine.close()
        self._engine = self._make()
        self.cached_tokens = 0


def open_source(options: argparse.Namespace) -> Any:
    """Return the model or shape that is measured."""
    from bise.model.checkpoint import open_model
    from bise.plan import known_shape

    return open_model(Path(options.model)) if options.model else known_shape(options.shape)


def make_server(options: argparse.Namespace, slots: int, context: int) -> Server:
    """Return the contestant `options.contestant`."""
    if options.contestant == "bise":
        return BiseServer(options, slots, context)
    from serving_llama import LlamaServer

    from bise.bench.gguf_file import gguf_path

    path = gguf_path(open_source(options), options.vs)
    return LlamaServer(path, slots=slots, context=context, threads=options.threads)


@dataclass
class Result:
    """What one load gave."""

    contestant: str
    load: str
    seconds: float
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    tokens_per_s: float
    """Answer tokens, all streams together."""
    first_p50_s: float
    first_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    steps: int


class Load:
    """Feeds one server with one load and takes the times."""

    def __init__(self, server: Server, trace: Trace, seconds: float) -> None:
        self.server, self.trace, self.limit_s = server, trace, seconds
        self.conversations: dict[int, Conversation] = {}
        self.submitted: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.count = self.prompt_tokens = self.output_tokens = self.steps = 0
        self.later: list[tuple[float, int, Conversation, list[int]]] = []

    def run_closed(self, streams: int) -> float:
        """Keep `streams` conversations going for the time that was given; returns the seconds taken."""
        began = time.perf_counter()
        for _ in range(streams):
            self.turn(self.trace.conversation(), [])
        while time.perf_counter() - began < self.limit_s:
            for _, conversation, answer in self.step():
                if not self.turn(conversation, answer):
                    self.turn(self.trace.conversation(), [])
        return time.perf_counter() - began

    def run_open(self, rate: float) -> float:
        """Let conversations arrive at `rate` per second for the time that was given, then finish them."""
        began = time.perf_counter()
        arrival = began + self.trace.gap_s(rate)
        while (now := time.perf_counter()) < began + self.limit_s or self.server.has_work:
            while arrival <= min(now, began + self.limit_s):
                self.turn(self.trace.conversation(), [], arrival)
                arrival += self.trace.gap_s(rate)
            while self.later and self.later[0][0] <= now:
                due, _, conversation, answer = heapq.heappop(self.later)
                if due < began + self.limit_s:
                    self.turn(conversation, answer, due)
            if not self.server.has_work:
                time.sleep(0.001)
                continue
            for number, conversation, answer in self.step():
                heapq.heappush(self.later, (time.perf_counter() + THINK_S, number, conversation, answer))
        return time.perf_counter() - began

    def turn(self, conversation: Conversation, answer: list[int], at: float | None = None) -> bool:
        """Submit the next turn of a conversation; False when it is over."""
        job = conversation.next_job(self.count, answer)
        if job is None:
            return False
        self.count += 1
        self.conversations[job.number] = conversation
        self.submitted[job.number] = time.perf_counter() if at is None else at
        self.prompt_tokens += len(job.prompt)
        self.server.submit(job)
        return True

    def step(self) -> list[tuple[int, Conversation, list[int]]]:
        """Step the server once; returns the jobs that ended: number, conversation, answer."""
        events = self.server.step()
        now = time.perf_counter()
        self.steps += 1
        ended: list[tuple[int, Conversation, list[int]]] = []
        for event in events:
            if not event.num_tokens:
                continue
            self.output_tokens += event.num_tokens
            if event.number in self.last:
                self.gaps.append(now - self.last[event.number])
            else:
                self.firsts.append(now - self.submitted[event.number])
            self.last[event.number] = now
            if event.is_last:
                answer = self.server.outputs.pop(event.number)
                ended.append((event.number, self.conversations.pop(event.number), answer))
        return ended


def quantile(values: list[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def contest(options: argparse.Namespace) -> None:
    """Be a contestant: read loads from stdin, one JSON line each, answer each with a line."""
    from bise.config import default_threads

    options.threads = options.threads or default_threads()
    source = open_source(options)
    vocab_size = source.config.vocab_size
    context = min(Trace(vocab_size, scale=options.scale).longest + 64, source.config.max_context)
    server = make_server(options, options.slots, context)
    print(json.dumps({"version": server.version}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        server.forget()
        load = Load(server, Trace(vocab_size, scale=options.scale, seed=options.seed), options.seconds)
        value = job["value"]
        seconds = load.run_closed(int(value)) if job["kind"] == "streams" else load.run_open(value)
        result = Result(
            contestant=options.contestant,
            load=f"{job['kind']} {value:g}",
            seconds=seconds,
            requests=len(load.firsts),
            prompt_tokens=load.prompt_tokens,
            cached_tokens=server.cached_tokens,
            output_tokens=load.output_tokens,
            tokens_per_s=load.output_tokens / seconds,
            first_p50_s=quantile(load.firsts, 0.5),
            first_p99_s=quantile(load.firsts, 0.99),
            gap_p50_s=quantile(load.gaps, 0.5),
            gap_p99_s=quantile(load.gaps, 0.99),
            steps=load.steps,
        )
        print(json.dumps(asdict(result)), flush=True)


class Contestant:
    """A process that serves one contestant."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, "--contestant", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()["version"]

    def run(self, kind: str, value: float) -> dict[str, Any]:
        """Return what a load gave."""
        assert self._process.stdin is not None
        print(json.dumps({"kind": kind, "value": value}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant ended; its message is above")
        return json.loads(line)


def shown(result: dict[str, Any]) -> str:
    """Return a result as a line of the table."""
    return (
        f"{result['load']:<14} {result['contestant']:<10} {result['requests']:>5} "
        f"{result['tokens_per_s']:>9.1f} {result['first_p50_s']:>9.3f} {result['first_p99_s']:>9.3f} "
        f"{result['gap_p50_s']:>9.4f} {result['gap_p99_s']:>9.4f} "
        f"{result['cached_tokens'] / max(1, result['prompt_tokens']):>7.0%}"
    )


def main() -> None:
    """Measure every load with every contestant in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory or GGUF file of a model")
    parser.add_argument("--shape", default="s06", help="shape of a model with random weights")
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--vs", default="Q4_0", help="GGUF kind for llama.cpp; `none` leaves it out")
    parser.add_argument("--streams", default="1,4,8,16", help="closed loop: conversations at once")
    parser.add_argument("--rates", default="", help="open loop: conversations per second")
    parser.add_argument("--seconds", type=float, default=60, help="per load and contestant")
    parser.add_argument("--slots", type=int, default=16, help="sequences at once")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the length of all texts")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS, help="pace of bise; 0: none")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--contestant", choices=["bise", "llama.cpp"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options)
        return
    names = ["bise"] if options.vs == "none" else ["bise", "llama.cpp"]
    contestants = {name: Contestant(name, sys.argv[1:]) for name in names}
    print(*(contestant.version for contestant in contestants.values()), sep=", ")
    print("load           contestant  done   tok/s    first p50       p99   gap p50       p99  cached")
    results: list[dict[str, Any]] = []
    loads = [("streams", float(n)) for n in options.streams.split(",") if n]
    loads += [("rate", float(rate)) for rate in options.rates.split(",") if rate]
    for kind, value in loads:
        for contestant in contestants.values():
            results.append(contestant.run(kind, value))
            print(shown(results[-1]), flush=True)
    for contestant in contestants.values():
        contestant.close()
    if options.out:
        document = {"command": sys.argv, "cpus": os.cpu_count(), "results": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
