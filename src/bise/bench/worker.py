"""A peer in a process of its own: requests as JSON lines on standard input, replies on a copy of standard
output.

So a peer's threads, memory and log lines end with it, and nothing of it touches this process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bise.bench.rounds import Case


class Peer(Protocol):
    """What a worker module builds from its options; all seconds are the peer's own measure of one turn."""

    version: str

    def prepare(self, case: Case, rounds: int) -> None:
        """Get ready for a case."""
        ...

    def run(self) -> float:
        """Take one turn."""
        ...

    def release(self) -> None:
        """Let go of what `prepare` took."""
        ...


def serve(make: Callable[[Mapping[str, Any]], Peer]) -> None:
    """Serve requests until standard input ends; the first line holds the options for `make`."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like; it must not reach the protocol

    def reply(**fields: object) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if peer is None:
                peer = make(request)
                reply(version=peer.version)
            elif request["do"] == "prepare":
                peer.prepare(Case(**request["case"]), request["rounds"])
                reply()
            elif request["do"] == "run":
                reply(seconds=peer.run())
            else:
                peer.release()
                reply()
        except Exception as error:  # a peer may fail in any way; whoever asked decides what that means
            reply(error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
