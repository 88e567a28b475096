"""Serving under load: a chat-like trace at rising concurrency and rates, `bise serve` beside llama-server.

    python benchmarks/serving.py --shape s06 --vs Q4_0 --streams 1,4,8,16 --rates 0.1,0.2,0.4 --out FILE

Both serve the same GGUF file of random weights over the same API (/v1/completions, streamed) with as many
slots and the same context, and take turns at each load; the other one is idle then. Closed loop
(`--streams`): so many conversations at once, the next turn follows the answer at once. Open loop (`--rates`):
so many conversations begin per second (Poisson), whoever got an answer thinks for two seconds. Each load is
measured for `--seconds`, then what still runs is cut; tokens that came until then count.

Both sample with llama.cpp's defaults (temperature 0.8, top-k 40, top-p 0.95, min-p 0.05). Greedy text of
random weights runs in circles, which would flatter a server that guesses ahead, as bise does; sampled text
does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from live_servers import LLAMA_SERVER, LiveServer, bise_server, llama_server
from serving_client import Answer, ask, quantile
from serving_trace import Conversation, Trace

from bise.bench.gguf_file import gguf_path
from bise.bench.report import provenance
from bise.bench.rounds import busy_seconds
from bise.config import default_threads
from bise.plan import known_shape, shape_source

THINK_S = 2.0
"""Open loop: pause between an answer and the next turn."""

SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@dataclass(frozen=True)
class Load:
    """How much is asked of a server."""

    kind: str
    """`streams` (closed loop) or `rate` (open loop)."""
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class Drive:
    """Puts one load on one server and takes the times."""

    def __init__(self, server: LiveServer, trace: Trace, seconds: float) -> None:
        self._server, self._trace = server, trace
        self._began = time.perf_counter()
        self._end = self._began + seconds
        self.answers: list[Answer] = []
        self._wanted: list[int] = []
        self._prompts: list[int] = []

    async def run(self, load: Load) -> None:
        """Put the load on for the time that was given, then cut what still runs."""
        if load.kind == "streams":
            tasks = [asyncio.ensure_future(self._stream()) for _ in range(int(load.value))]
        else:
            tasks = [asyncio.ensure_future(self._arrivals(load.value))]
        await asyncio.sleep(max(0.0, self._end - time.perf_counter()))
        await _cut(tasks)

    async def _stream(self) -> None:
        while True:
            await self._talk(self._trace.conversation(), 0.0)

    async def _arrivals(self, rate: float) -> None:
        due, talks = self._began, list[asyncio.Future[None]]()
        try:
            while True:
                due += self._trace.gap_s(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                talks.append(asyncio.ensure_future(self._talk(self._trace.conversation(), THINK_S)))
        finally:
            await _cut(talks)

    async def _talk(self, conversation: Conversation, think_s: float) -> None:
        text = ""
        while turn := conversation.next_turn(text):
            body: dict[str, Any] = {
                "model": self._server.model,
                "prompt": list(turn.prompt),
                "max_tokens": turn.num_output,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "seed": len(self.answers),
                **SAMPLING,
            }
            answer = Answer(time.perf_counter())
            self.answers.append(answer)
            self._wanted.append(turn.num_output)
            self._prompts.append(len(turn.prompt))
            await ask(self._server.url, "/v1/completions", body, answer=answer)
            text = answer.text
            await asyncio.sleep(think_s)

    def result(self) -> dict[str, Any]:
        """Return the numbers."""
        seconds = self._end - self._began
        pieces = [
            (when, text) for answer in self.answers for when, text in answer.pieces if when <= self._end
        ]
        # Each piece of the synthetic vocabulary has one "t"; single bytes are rare and do not count.
        tokens = sum(text.count("t") for _, text in pieces)
        whole = [(a, n) for a, n in zip(self.answers, self._wanted, strict=True) if a.ended is not None]
        # Who still waits has waited at least until now: leaving them out would flatter a server that is late.
        firsts = [a.first_s if a.first_s is not None else self._end - a.asked for a in self.answers]
        gaps = [
            later - sooner
            for answer in self.answers
            for (sooner, _), (later, _) in zip(answer.pieces, answer.pieces[1:], strict=False)
        ]
        cached = [(a.usage or {}).get("prompt_tokens_details", {}).get("cached_tokens", 0) for a, _ in whole]
        lengths = [n for a, n in zip(self.answers, self._prompts, strict=True) if a.ended is not None]
        return {
            "seconds": seconds,
            "requests": len(self.answers),
            "finished": len(whole),
            "unanswered": sum(not answer.pieces for answer in self.answers),
            "errors": sorted({a.error for a in self.answers if a.error and a.asked < self._end - 0.5}),
            "wrong_lengths": sum((a.usage or {}).get("completion_tokens") != n for a, n in whole),
            "output_tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "cached_share": sum(cached) / max(1, sum(lengths)),
            "first_p50_s": quantile(firsts, 0.5),
            "first_p99_s": quantile(firsts, 0.99),
            "gap_p50_s": quantile(gaps, 0.5),
            "gap_p99_s": quantile(gaps, 0.99),
            "gap_max_s": max(gaps, default=None),
        }


async def _cut(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


def measure(
    server: LiveServer, load: Load, options: argparse.Namespace, vocab_size: int, seed: int
) -> dict[str, Any]:
    """Return what one load gave on one server."""
    drive = Drive(server, Trace(vocab_size, scale=options.scale, seed=seed), options.seconds)
    cpu, own, busy = server.cpu_s, time.process_time(), busy_seconds()
    asyncio.run(drive.run(load))
    result = drive.result()
    used, client = server.cpu_s - cpu, time.process_time() - own
    after = busy_seconds()
    foreign = None if busy is None or after is None else max(0.0, after - busy - used - client)
    return {
        "contestant": server.name,
        "load": str(load),
        **result,
        "server_cpu_s": used,
        "client_cpu_s": client,
        "foreign_cores": None if foreign is None else foreign / result["seconds"],
    }


def warm_up(server: LiveServer) -> None:
    """Let a server answer once, so that everything is in memory."""
    body = {"model": server.model, "prompt": [1, *range(300, 364)], "max_tokens": 8, "stream": True}
    answer = asyncio.run(ask(server.url, "/v1/completions", body))
    if answer.error or not answer.pieces:
        raise SystemExit(f"{server.name} does not answer: {answer.error}")


@contextlib.contextmanager
def contestants(options: argparse.Namespace, path: Path) -> Iterator[list[LiveServer]]:
    """Start the servers: as many sequences and the same context for each."""
    slots, context = options.slots, options.context
    with contextlib.ExitStack() as stack:
        own = ["--sequences", str(slots), "--context", str(context), "--threads", str(options.threads)]
        servers = [stack.enter_context(bise_server(path, *own, *shlex.split(options.bise_options)))]
        if not options.alone:
            peer = ["-np", str(slots), "-c", str(slots * context), "-t", str(options.threads), "--no-ui"]
            peer += shlex.split(options.llama_options)
            servers.append(stack.enter_context(llama_server(options.llama_server, path, *peer)))
        for server in servers:
            warm_up(server)
        yield servers


def shown(result: dict[str, Any]) -> str:
    """Return a result as a line of the table."""

    def number(name: str, width: int, digits: int) -> str:
        value = result[name]
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    return (
        f"{result['load']:<12} {result['contestant']:<10} {result['finished']:>5} "
        f"{number('tokens_per_s', 8, 1)} {number('first_p50_s', 10, 3)} {number('first_p99_s', 9, 3)} "
        f"{number('gap_p50_s', 9, 4)} {number('gap_p99_s', 9, 4)} {result['cached_share']:>6.0%} "
        f"{number('foreign_cores', 7, 2)}{' errors: ' + str(result['errors']) if result['errors'] else ''}"
    )


def main() -> None:
    """Measure every load with every contestant in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="s06", help="shape of the model with random weights")
    parser.add_argument("--layers", type=int, help="so many of its layers")
    parser.add_argument("--vs", default="Q4_0", help="kind of the GGUF file that both serve")
    parser.add_argument("--streams", default="1,4,8,16", help="closed loop: conversations at once")
    parser.add_argument("--rates", default="", help="open loop: conversations per second")
    parser.add_argument("--seconds", type=float, default=30, help="per load and contestant")
    parser.add_argument("--rounds", type=int, default=1, help="times that every load is measured")
    parser.add_argument("--slots", type=int, default=16, help="sequences at once")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a conversation at most")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the length of all texts")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--llama-server", type=Path, default=LLAMA_SERVER, help="the program")
    parser.add_argument("--llama-options", default="", help="further options for it")
    parser.add_argument("--bise-options", default="", help="further options for `bise serve`")
    parser.add_argument("--out", type=Path, help="file to add the results to")
    options = parser.parse_args()
    source = known_shape(options.shape)
    if options.layers:
        name, layers = f"{options.shape}-{options.layers}-layers", options.layers
        windows = source.config.windows[:layers]
        source = shape_source(name, replace(source.config, num_layers=layers, windows=windows))
    path = gguf_path(source, options.vs)
    loads = [Load("streams", float(n)) for n in options.streams.split(",") if n]
    loads += [Load("rate", float(rate)) for rate in options.rates.split(",") if rate]
    results: list[dict[str, Any]] = []
    with contestants(options, path) as servers:
        print("load         contestant  done   tok/s  first p50       p99   gap p50       p99 cached foreign")
        for number in range(options.rounds):
            for index, load in enumerate(loads):
                seed = options.seed + 1000 * number + index
                for server in servers if (number + index) % 2 == 0 else reversed(servers):
                    results.append(measure(server, load, options, source.config.vocab_size, seed))
                    print(shown(results[-1]), flush=True)
                    time.sleep(1)  # what was cut must have left the engine
        commands = [shlex.join(server.command) for server in servers]
    if options.out:
        write(options.out, source.name, options, commands, results)


def write(
    out: Path, shape: str, options: argparse.Namespace, commands: list[str], results: list[dict[str, Any]]
) -> None:
    """Add a run to a file of results."""
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": []}
    document["runs"].append(
        {
            "benchmark": "serving",
            "model": f"{shape}, {options.vs}, random weights",
            **provenance(shlex.join(["python", *sys.argv]), options.threads, ""),
            "servers": commands,
            "results": results,
        }
    )
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
