"""llama.cpp as a server with parallel slots, for serving.py.

llama-cpp-python brings the library but not llama.cpp's server, and its own server takes one request at a
time. This is the loop of llama.cpp's server over the library's batched interface: every step holds one token
of each slot that generates and, up to n_batch, prompt tokens of the slots that read; a new request takes the
free slot whose text shares the longest beginning with its prompt, and only the rest is computed. Sampling is
the library's own greedy sampler. Sizes are the server's defaults: n_batch 2048, n_ubatch 512, flash attention
auto.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from serving_trace import Event, Job

BATCH, MICRO_BATCH = 2048, 512


@dataclass
class Slot:
    """One sequence of the library's context."""

    number: int
    tokens: list[int] = field(default_factory=list)
    """What its cache holds."""
    job: Job | None = None
    pending: list[int] = field(default_factory=list)
    """Tokens to compute before the next one is chosen."""
    num_output: int = 0


class LlamaServer:
    """Serves jobs in slots, step by step."""

    def __init__(self, path: Path, *, slots: int, context: int, threads: int) -> None:
        self._api: Any = import_module("llama_cpp")
        api = self._api
        self.version = f"llama.cpp (llama-cpp-python {api.__version__})"
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = slots * (-(-context // 256) * 256)
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        self._memory = api.llama_get_memory(self._context)
        self._sampler = api.llama_sampler_init_greedy()
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        self._slots = [Slot(number) for number in range(slots)]
        self._queue: deque[Job] = deque()
        self.cached_tokens = 0
        self.outputs: dict[int, list[int]] = {}

    @property
    def has_work(self) -> bool:
        """True while anything waits or runs."""
        return bool(self._queue) or any(slot.job for slot in self._slots)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append(job)
        self.outputs[job.number] = []

    def step(self) -> list[Event]:
        """Run one decode call; returns what it produced."""
        while self._queue and (free := [slot for slot in self._slots if slot.job is None]):
            self._assign(self._queue.popleft(), free)
        chosen = self._fill()
        code = self._api.llama_decode(self._context, self._batch)
        if code != 0:
            raise SystemExit(f"llama_decode returned {code}")
        events: list[Event] = []
        for row, slot in chosen:
            token = int(self._api.llama_sampler_sample(self._sampler, self._context, row))
            job = slot.job
            assert job is not None
            self.outputs[job.number].append(token)
            slot.num_output += 1
            is_last = slot.num_output == job.num_output
            slot.pending = [token]
            if is_last:
                slot.job = None
            events.append(Event(job.number, 1, is_last))
        return events

    def forget(self) -> None:
        """Empty all slots, so that the next load starts cold."""
        self._api.llama_memory_clear(self._memory, True)
        self._slots = [Slot(slot.number) for slot in self._slots]
        self.cached_tokens = 0

    def _assign(self, job: Job, free: list[Slot]) -> None:
        slot = max(free, key=lambda slot: _shared(slot.tokens, job.prompt))
        kept = min(_shared(slot.tokens, job.prompt), len(job.prompt) - 1)
        self._api.llama_memory_seq_rm(self._memory, slot.number, kept, -1)
        slot.tokens = list(job.prompt[:kept])
        slot.pending = list(job.prompt[kept:])
        slot.job, slot.num_output = job, 0
        self.cached_tokens += kept

    def _fill(self) -> list[tuple[int, Slot]]:
        """Lay out one batch; returns the rows whose logits choose a token."""
        batch, row = self._batch, 0
        chosen: list[tuple[int, Slot]] = []
        busy = [slot for slot in self._slots if slot.job is not None]
        for slot in sorted(busy, key=lambda slot: slot.num_output == 0):  # those that generate come first
            count = min(len(slot.pending), BATCH - row)
            for token in slot.pending[:count]:
                batch.token[row] = token
                batch.pos[row] = len(slot.tokens)
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = slot.number
                batch.logits[row] = False
                slot.tokens.append(token)
                row += 1
            slot.pending = slot.pending[count:]
            if count and not slot.pending:
                batch.logits[row - 1] = True
                chosen.append((row - 1, slot))
        batch.n_tokens = row
        return chosen


def _shared(one: list[int], other: tuple[int, ...]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
