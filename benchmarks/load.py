"""Load on a live `bise serve` with the embedded model: many streams, and many connections that do nothing.

    python benchmarks/load.py [--streams 32,200] [--seconds 20] [--connections 1000] [--out FILE]

Streams: so many clients at once, each asks for a chat answer of `--tokens` tokens, streamed, and asks again
when it is there. The same work is done once more by the engine alone in this process, without a server: what
the server takes more processor time for, per token, is its overhead. /health is asked meanwhile, from a
process of its own: how long that takes bounds the lag of the event loop (RELIABILITY.md, R7: below 0.25 s).

Connections (R6): idle ones, requests with half a header, and streams that nobody reads; while they are there
a normal request must not take twice as long to its first token, each may cost 64 KiB, and they are closed
after their time. Exits 1 when an answer failed or a bound does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from live_servers import LiveServer, bise_server
from serving_client import Answer, allow_connections, ask, post, quantile

from bise.bench.report import provenance
from bise.bench.rounds import busy_seconds
from bise.config import default_threads
from bise.engine.load import load_model
from bise.engine.request import Delta, Request, SamplingParams
from bise.hub.embedded import embedded_path

PATH = "/v1/chat/completions"
TOPICS = ("rivers", "wind", "bread", "maps", "trains", "bees", "snow", "clocks", "salt", "ships")
MAX_LAG_S = 0.25
MAX_CONNECTION_BYTES = 64 << 10
UNREAD = "unread streams"
HEADERS_S = 30.0
"""After so long a connection without a whole head is closed."""


def question(number: int) -> str:
    """Return a question that no other number has."""
    return f"Tell me about {TOPICS[number % len(TOPICS)]} and the number {number}."


def body(number: int, tokens: int) -> dict[str, Any]:
    """Return a chat request."""
    return {
        "model": "brise",
        "messages": [{"role": "user", "content": question(number)}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def engine_alone(streams: int, tokens: int, seconds: float, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second and processor seconds per token of the engine, stepped by this process."""
    loaded = load_model(
        embedded_path(), max_sequences=options.sequences, threads=options.threads, threaded=False
    )
    assert loaded.template is not None
    engine, numbers = loaded.engine, iter(range(1 << 30))
    produced = 0

    def start() -> None:
        number = next(numbers)
        ids = tuple(loaded.template.encode([{"role": "user", "content": question(number)}]))
        params = SamplingParams(temperature=0.8, max_tokens=tokens, seed=number, ignore_eos=True)
        handle = engine.submit(Request(token_ids=ids, params=params))

        def push(delta: Delta) -> None:
            nonlocal produced, due
            produced += len(delta.token_ids)
            due += delta.finish_reason is not None

        handle.push = push

    due = streams
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        while due:
            due -= 1
            start()
        engine.step()
    wall, used = time.perf_counter() - began, time.process_time() - cpu
    loaded.close()
    return {"tokens_per_s": produced / wall, "cpu_s_per_token": used / produced}


class Prober:
    """Asks /health over and over from a process of its own."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, __file__, "--probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> dict[str, float]:
        """Return how long the answers took."""
        found, _ = self._process.communicate("stop\n", timeout=10)
        return json.loads(found)


def probe(url: str) -> None:
    """Ask /health every 20 ms until stdin says stop; then print what it took."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    taken: list[float] = []
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        began = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        taken.append(time.perf_counter() - began)
    print(json.dumps({"count": len(taken), "p50_s": quantile(taken, 0.5), "p99_s": quantile(taken, 0.99),
                      "max_s": max(taken)}))  # fmt: skip


async def put_load(server: LiveServer, streams: int, tokens: int, seconds: float) -> list[Answer]:
    """Keep so many streams going for a time, then let them finish."""
    end = time.perf_counter() + seconds
    answers: list[Answer] = []
    numbers = iter(range(1 << 30))

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(answer := Answer(time.perf_counter()))
            await ask(server.url, PATH, body(next(numbers), tokens), answer=answer)

    await asyncio.gather(*(client() for _ in range(streams)))
    return answers


def streams_entry(server: LiveServer, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what so many streams gave, beside the engine alone."""
    tokens = options.tokens
    alone = engine_alone(streams, tokens, min(5.0, options.seconds), options)
    prober = Prober(server.url)
    busy, cpu, began, own = busy_seconds(), server.cpu_s, time.perf_counter(), time.process_time()
    answers = asyncio.run(put_load(server, streams, tokens, options.seconds))
    wall, used = time.perf_counter() - began, server.cpu_s - cpu
    client = time.process_time() - own
    after = busy_seconds()
    foreign = None if busy is None or after is None else max(0.0, after - busy - used - client) / wall
    lag = prober.stop()
    done = [answer for answer in answers if answer.ended is not None and answer.error is None]
    counts = [(answer.usage or {}).get("completion_tokens", 0) for answer in done]
    gaps = [
        later - sooner
        for answer in done
        for (sooner, _), (later, _) in zip(answer.pieces, answer.pieces[1:], strict=False)
    ]
    firsts = [answer.first_s for answer in done if answer.first_s is not None]
    produced = sum(counts)
    return {
        "streams": streams,
        "requests": len(answers),
        "errors": sorted({answer.error or "cut" for answer in answers if answer not in done}),
        "wrong_lengths": sum(count != tokens for count in counts),
        "output_tokens": produced,
        "tokens_per_s": produced / wall,
        "pieces_per_token": sum(len(answer.pieces) for answer in done) / max(1, produced),
        "first_p50_s": quantile(firsts, 0.5),
        "first_p99_s": quantile(firsts, 0.99),
        "gap_p50_s": quantile(gaps, 0.5),
        "gap_p99_s": quantile(gaps, 0.99),
        "gap_max_s": max(gaps, default=None),
        "server_cpu_s_per_token": used / max(1, produced),
        "client_cpu_s_per_token": client / max(1, produced),
        "foreign_cores": foreign,
        "engine_alone": alone,
        "overhead_cpu_s_per_token": used / max(1, produced) - alone["cpu_s_per_token"],
        "health": lag,
    }


def first_s(server: LiveServer, number: int) -> float:
    """Return the time to the first token of a normal request."""
    answer = asyncio.run(ask(server.url, PATH, body(number, 8)))
    if answer.error or answer.first_s is None:
        raise SystemExit(f"a normal request failed: {answer.error}")
    return answer.first_s


@contextlib.contextmanager
def open_connections(server: LiveServer, count: int, said: bytes) -> Iterator[list[socket.socket]]:
    """Open connections that say so much and no more."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        made: list[socket.socket] = []
        for _ in range(count):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect((host, int(port)))
            connection.sendall(said)
            made.append(connection)
        yield made


def crowd_entry(
    server: LiveServer, name: str, count: int, said: bytes, closes: float | None
) -> dict[str, Any]:
    """Return what so many connections that hang about cost."""
    before = sorted(first_s(server, 5000 + number) for number in range(5))[2]
    resident = server.resident_bytes
    began = time.perf_counter()
    with open_connections(server, count, said) as connections:
        opened_s = time.perf_counter() - began
        prober = Prober(server.url)
        during = sorted(first_s(server, 6000 + number) for number in range(5))[2]
        cost = max(0, server.resident_bytes - resident) / count
        closed_s = None
        if closes is not None:
            closed_s = _all_closed(connections, began, closes + 10)
        lag = prober.stop()
    return {
        "connections": name,
        "count": count,
        "open_s": opened_s,
        "first_before_s": before,
        "first_during_s": during,
        "bytes_per_connection": cost,
        "closed_after_s": closed_s,
        "health": lag,
    }


def _all_closed(connections: Sequence[socket.socket], began: float, limit_s: float) -> float | None:
    """Return when the last connection was closed by the server; None when one stays open."""
    for connection in connections:
        connection.settimeout(max(0.1, began + limit_s - time.perf_counter()))
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            return None
        except OSError:
            continue
    return time.perf_counter() - began


def crowds(server: LiveServer, count: int) -> Iterator[dict[str, Any]]:
    """Yield an entry for each kind of connection that hangs about."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-le"
    yield crowd_entry(server, "idle", count, b"", HEADERS_S)
    yield crowd_entry(server, "half a head", count, head, HEADERS_S)
    unread = post(server.url, PATH, body(random.Random(0).randrange(9999), 400))
    yield crowd_entry(server, UNREAD, max(1, count // 5), unread, None)


def faults(streams: Sequence[dict[str, Any]], hanging: Sequence[dict[str, Any]]) -> list[str]:
    """Return the bounds that do not hold, one line each."""
    found: list[str] = []
    for entry in streams:
        if entry["errors"] or entry["wrong_lengths"]:
            wrong = entry["wrong_lengths"]
            found.append(f"{entry['streams']} streams: errors {entry['errors']}, {wrong} of a wrong length")
    for entry in hanging:
        name, before, during = entry["connections"], entry["first_before_s"], entry["first_during_s"]
        if entry["bytes_per_connection"] > MAX_CONNECTION_BYTES:
            found.append(f"{name}: {entry['bytes_per_connection']:.0f} bytes a connection")
        if name == UNREAD:  # those take part of the engine by right
            continue
        if during > 2 * before + 0.01:
            found.append(f"{name}: the first token took {before:.3f} s before and {during:.3f} s then")
        if entry["closed_after_s"] is None:
            found.append(f"{name}: not all were closed in time")
    found += [
        f"/health took {entry['health']['max_s']:.3f} s"
        for entry in (*streams, *hanging)
        if entry["health"]["max_s"] > MAX_LAG_S
    ]
    return found


def main() -> int:
    """Measure, print a table, write the results; 1 when a bound does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="32,200", help="clients at once")
    parser.add_argument("--seconds", type=float, default=20, help="per number of streams")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--connections", type=int, default=1000, help="that hang about; 0: none")
    parser.add_argument("--sequences", type=int, default=8, help="as in `bise serve`")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path, help="file to add the results to")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe)
        return 0
    allow_connections(2 * options.connections + 400)
    streams: list[dict[str, Any]] = []
    hanging: list[dict[str, Any]] = []
    own = ["--sequences", str(options.sequences), "--threads", str(options.threads), "--no-key"]
    with bise_server(None, *own) as server:
        first_s(server, 9999)
        for count in (int(text) for text in options.streams.split(",") if text):
            streams.append(streams_entry(server, count, options))
            print(json.dumps(streams[-1], indent=1), flush=True)
        for entry in crowds(server, options.connections) if options.connections else ():
            hanging.append(entry)
            print(json.dumps(entry, indent=1), flush=True)
        command = shlex.join(server.command)
    broken = faults(streams, hanging)
    if options.out:
        document = (
            json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"runs": []}
        )
        document["runs"].append(
            {
                "benchmark": "load",
                "model": "brise, the embedded one",
                **provenance(shlex.join(["python", *sys.argv]), options.threads, ""),
                "servers": [command],
                "streams": streams,
                "connections": hanging,
                "faults": broken,
            }
        )
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(broken) or "every bound holds", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
