"""Clients that leave in the middle, in every way there is; then the server must be idle and the same.

    python tests/contract/storm.py --port 8000 --model brise [--rounds 3] [--clients 200]

Exit code 1 when a slot stays taken for more than two seconds after a round, or the answer changes.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from http_fuzz import baseline
from raw_http import Wire, ask, post

PATH = "/v1/chat/completions"


def body(model: str, *, stream: bool, tokens: int = 400, **fields: object) -> bytes:
    """Return the bytes of a chat request that would run for long."""
    wanted = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a long story."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
        **fields,
    }
    return post(PATH, json.dumps(wanted).encode())


def reset(wire: Wire) -> None:
    """Close with RST instead of FIN."""
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def read_some(wire: Wire, size: int) -> None:
    """Read up to `size` bytes of whatever comes."""
    got = 0
    while got < size:
        data = wire.socket.recv(min(4096, size - got))
        if not data:
            return
        got += len(data)


def before_anything(port: int, model: str, chance: random.Random) -> None:
    """Connect and leave."""
    Wire(port).socket.close()


def half_headers(port: int, model: str, chance: random.Random) -> None:
    """Leave in the headers."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True)[: chance.randint(5, 60)])


def half_body(port: int, model: str, chance: random.Random) -> None:
    """Leave in the body."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True)[: -chance.randint(1, 60)])


def sent_and_gone(port: int, model: str, chance: random.Random) -> None:
    """Send a stream request and leave at once."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True))


def sent_and_reset(port: int, model: str, chance: random.Random) -> None:
    """Send a stream request and reset at once."""
    with Wire(port) as wire:
        reset(wire)
        wire.send(body(model, stream=True))


def first_bytes(port: int, model: str, chance: random.Random) -> None:
    """Leave with the status line read."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True))
        read_some(wire, 12)


def mid_stream(port: int, model: str, chance: random.Random) -> None:
    """Leave somewhere in the stream."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True))
        read_some(wire, chance.randint(500, 5000))


def mid_stream_reset(port: int, model: str, chance: random.Random) -> None:
    """Reset somewhere in the stream."""
    with Wire(port) as wire:
        reset(wire)
        wire.send(body(model, stream=True))
        read_some(wire, chance.randint(500, 5000))


def half_close(port: int, model: str, chance: random.Random) -> None:
    """Close the sending side, read on for a moment, leave."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True))
        wire.socket.shutdown(socket.SHUT_WR)
        read_some(wire, 600)


def stalled(port: int, model: str, chance: random.Random) -> None:
    """Stop reading, with a small window, then leave."""
    with Wire(port, receive_buffer=2048) as wire:
        wire.send(body(model, stream=True, logprobs=True, top_logprobs=20))
        read_some(wire, 100)
        time.sleep(chance.uniform(0.1, 0.4))


def plain_and_gone(port: int, model: str, chance: random.Random) -> None:
    """Ask for a whole answer and leave while it is made."""
    with Wire(port) as wire:
        wire.send(body(model, stream=False))
        time.sleep(chance.uniform(0, 0.1))


def plain_and_reset(port: int, model: str, chance: random.Random) -> None:
    """Ask for a whole answer and reset while it is made."""
    with Wire(port) as wire:
        reset(wire)
        wire.send(body(model, stream=False))
        time.sleep(chance.uniform(0, 0.1))


def many_choices(port: int, model: str, chance: random.Random) -> None:
    """Leave a stream of several choices."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True, n=4, tokens=100))
        read_some(wire, chance.randint(100, 3000))


def pipelined(port: int, model: str, chance: random.Random) -> None:
    """Send two requests on one connection and leave during the first."""
    with Wire(port) as wire:
        wire.send(body(model, stream=True) + body(model, stream=True))
        read_some(wire, 400)


MODES: tuple[Callable[[int, str, random.Random], None], ...] = (
    before_anything, half_headers, half_body, sent_and_gone, sent_and_reset, first_bytes, mid_stream,
    mid_stream_reset, half_close, stalled, plain_and_gone, plain_and_reset, many_choices, pipelined,
)  # fmt: skip


def state(port: int) -> dict[str, int]:
    """Return what runs and waits."""
    reply = ask(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").json
    return {name: reply[name] for name in ("running", "waiting", "requests")}


def until_idle(port: int, limit_s: float) -> float | None:
    """Return the seconds until nothing runs or waits; None when that takes longer than `limit_s`."""
    start = time.perf_counter()
    while any(state(port).values()):
        if time.perf_counter() - start > limit_s:
            return None
        time.sleep(0.02)
    return time.perf_counter() - start


def round_of(port: int, model: str, clients: int, seed: int) -> None:
    """Let `clients` clients leave in the modes by turns, up to 32 at once."""

    def one(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        try:
            MODES[number % len(MODES)](port, model, chance)
        except (ConnectionError, TimeoutError):
            return

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(clients)))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="brise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    before = baseline(options.port, options.model)
    bad = 0
    for number in range(options.rounds):
        round_of(options.port, options.model, options.clients, number)
        idle = until_idle(options.port, 2.0)
        bad += idle is None
        print(f"round {number + 1}: {options.clients} clients left; " + (
            f"idle after {idle:.2f} s" if idle is not None else f"NOT idle after 2 s: {state(options.port)}"
        ))  # fmt: skip
    same = baseline(options.port, options.model) == before
    print(f"the answer afterwards is {'the same' if same else 'DIFFERENT'}")
    return 1 if bad or not same else 0


if __name__ == "__main__":
    sys.exit(main())
