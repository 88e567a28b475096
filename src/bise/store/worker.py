"""Which process holds a piece of work, and whether that process is still there.

Work that a process holds carries a lease, renewed while the process lives. A dead process of the same machine
is recognised at once, any other when its lease has run out.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

LEASE_S = 60.0
"""A lease lasts this long without renewal; renew at a third of it."""


def this_worker() -> str:
    """Return a name for this process that no other one shares: machine, process id, start time."""
    return f"{_machine()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(worker: str) -> bool:
    """Return True when the process is known to have ended; False when it lives or cannot be seen."""
    machine, pid, started = worker.rsplit(":", 2)
    if machine != _machine() or not Path("/proc/self/stat").exists():
        return False
    return _started(int(pid)) != started


def _machine() -> str:
    """Return host name and process namespace: only inside both do process ids mean the same."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = "pid"
    return f"{socket.gethostname()[:100]}/{namespace.replace(':', '')}"


def _started(pid: int) -> str:
    """Return when the process started, in clock ticks since boot; empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    except OSError:
        return ""
    # The command's name stands in brackets and may hold anything; after it comes the state, then numbers.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]
