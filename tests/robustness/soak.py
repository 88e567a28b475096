"""Many small requests, of which many are aborted: no block is lost and memory does not grow.

python soak.py [--requests 20000] [--aborted 0.4] [--leak memory|blocks]      exits 1 when something leaked

`--leak` makes the engine leak on purpose: the positive control, which must exit 1.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from bise.config import ModelConfig
from bise.engine.blocks import BlockBook
from bise.engine.engine import Engine
from bise.engine.handle import RequestHandle
from bise.engine.request import FinishReason, Request, SamplingParams
from bise.engine.speculation import Speculation
from bise.errors import QueueFullError
from bise.kernels.cpu import CpuOps
from bise.model.transformer import Transformer, weight_shapes

MAX_GROWTH_BYTES = 32 << 20
CLIENTS = 8
VOCAB = 256
SYSTEM = tuple(random.Random(0).randrange(VOCAB) for _ in range(70))


def tiny_engine(num_blocks: int) -> Engine:
    """Return an engine over random weights, with full and windowed layers and every feature that is cheap."""
    config = ModelConfig(
        family="mistral", dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=VOCAB, max_context=512, windows=(None, 48),
    )  # fmt: skip
    ops, rng = CpuOps(1), np.random.default_rng(0)
    weights: dict[str, object] = {}
    for name, shape in weight_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        weights[name] = ops.vector(1 + 0.1 * values) if len(shape) == 1 else ops.quantized(values, "q8")
    return Engine(
        Transformer(config, weights, ops),
        ops,
        config=config,
        tokenizer=None,
        kv_format="f16",
        num_blocks=num_blocks,
        max_step_tokens=64,
        max_sequences=12,
        max_queue=CLIENTS,
        speculation=Speculation(),
    )


def random_request(rng: random.Random) -> Request:
    """Return a small request; half of them begin alike."""
    start = SYSTEM if rng.random() < 0.5 else ()
    return Request(
        token_ids=(*start, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60)))),
        params=SamplingParams(max_tokens=rng.randrange(1, 16), seed=rng.randrange(1 << 30), logprobs=1),
        tenant=f"tenant {rng.randrange(4)}",
        priority=rng.randrange(3),
        deadline_s=rng.choice([None, 60.0, 0.003]),
        prompt_logprobs=rng.random() < 0.1,
        use_prefix_cache=rng.random() < 0.9,
    )


class Clients:
    """Threads that submit, read, and leave early."""

    def __init__(self, engine: Engine, aborted: float) -> None:
        self.engine = engine
        self.aborted = aborted
        self.outcomes: Counter[str] = Counter()
        self.lock = threading.Lock()

    def run(self, count: int, seed: int) -> None:
        """Have `count` requests done by all clients together."""
        threads = [
            threading.Thread(target=self._work, args=(count // CLIENTS, random.Random(seed * 100 + index)))
            for index in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, count: int, rng: random.Random) -> None:
        for _ in range(count):
            leaves = rng.random() < self.aborted
            outcome = self._read(self._submit(random_request(rng)), rng.randrange(4) if leaves else None)
            with self.lock:
                self.outcomes["left" if leaves else outcome] += 1

    def _submit(self, request: Request) -> RequestHandle:
        while True:
            try:
                return self.engine.submit(request)
            except QueueFullError as error:
                time.sleep(min(error.retry_after_s, 0.001))

    def _read(self, handle: RequestHandle, patience: int | None) -> str:
        if patience == 0:
            handle.cancel()
        reason: FinishReason | None = None
        for index, delta in enumerate(handle, 1):
            reason = delta.finish_reason
            if index == patience:
                break
        return str(reason)


def resident_bytes() -> int:
    """Return the resident size of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS:")).split()[1]) * 1024


def leak_blocks() -> None:
    """Make the block book forget to take back every 100th sequence's blocks."""
    release, calls = BlockBook.release, Counter[str]()

    def forgetful(self: BlockBook, sequence) -> None:
        calls["release"] += 1
        if calls["release"] % 100:
            release(self, sequence)
        else:
            sequence.tables, sequence.tail = (), None

    BlockBook.release = forgetful


def soak(num_requests: int, aborted: float, leak: str | None) -> list[str]:
    """Run the load and return what is wrong afterwards."""
    kept: list[bytes] = []
    if leak == "blocks":
        leak_blocks()
    engine = tiny_engine(num_blocks=400 if leak == "blocks" else 20)
    clients = Clients(engine, aborted)
    # Warm: all pages written, all caches full, all arenas of the allocator there.
    clients.run(max(CLIENTS, num_requests // 10), 1)
    gc.collect()
    before, batch = resident_bytes(), max(CLIENTS, num_requests // 20)
    for number in range(18):
        clients.run(batch, number + 2)
        if leak == "memory":
            kept.append(b"x" * (MAX_GROWTH_BYTES // 12))
    gc.collect()
    growth = resident_bytes() - before
    engine.close(drain=True)
    faults = _faults(engine)
    if growth >= MAX_GROWTH_BYTES:
        faults.append(f"resident memory grew by {growth >> 20} MiB, {MAX_GROWTH_BYTES >> 20} are allowed")
    stats = engine.stats()
    sys.stdout.write(
        f"{sum(clients.outcomes.values())} requests {dict(sorted(clients.outcomes.items()))}\n"
        f"{stats.num_preemptions} preemptions, {stats.cached_tokens} of {stats.prompt_tokens} prompt tokens "
        f"cached, memory {growth / 2**20:+.1f} MiB\n"
    )
    return faults


def _faults(engine: Engine) -> list[str]:
    stats = engine.stats()
    faults: list[str] = []
    if engine.failure is not None:
        faults.append(f"the engine died: {engine.failure}")
    if stats.num_free_blocks != stats.num_blocks:
        faults.append(f"blocks are lost: {stats.num_free_blocks} of {stats.num_blocks} are free")
    if stats.num_running or stats.num_waiting:
        faults.append(f"{stats.num_running} sequences run and {stats.num_waiting} wait for ever")
    try:
        engine._scheduler.check_integrity()
    except AssertionError as error:
        faults.append(f"the books do not balance: {error}")
    return faults


def main() -> int:
    """Soak and tell; returns 1 when something leaked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--aborted", type=float, default=0.4)
    parser.add_argument("--leak", choices=["memory", "blocks"])
    options = parser.parse_args()
    faults = soak(options.requests, options.aborted, options.leak)
    for fault in faults:
        sys.stdout.write(f"LEAK: {fault}\n")
    sys.stdout.write("leaks found\n" if faults else "nothing leaked\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
