"""llama.cpp as a peer, through the low-level functions of llama-cpp-python: one `llama_decode` per step.

Both settings of flash attention are tried on the first case of a kind (prefill, decode, decode at depth); the
faster one is measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from bise.bench.rounds import Case
from bise.bench.worker import serve

CHUNK = 512

LONG = 1024
"""Contexts from here on count as deep: flash attention pays or costs there."""


class LlamaPeer:
    """A GGUF file behind llama.cpp."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._api: Any = import_module("llama_cpp")
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else it tells all it loads
        self.version: str = self._api.__version__
        self._threads = int(options["threads"])
        self._api.llama_backend_init()
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = int(options.get("gpu_layers", 0))
        self._model = self._api.llama_model_load_from_file(str(options["path"]).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {options['path']}")
        vocab = self._api.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._api.llama_vocab_n_tokens(vocab))
        self._flash: dict[tuple[str, bool], int] = {}
        self._context: Any = None
        self._case: Case | None = None
        self._batch: Any = None
        self._position = 0

    def prepare(self, case: Case, rounds: int) -> None:
        """Make a context; the first of its kind is tried with each setting of flash attention, and the faster
        one is kept for that kind.
        """
        kind = (case.op, case.context >= LONG)
        if kind not in self._flash:
            self._flash[kind] = self._faster(case, rounds)
        self._start(case, rounds, self._flash[kind])

    def _faster(self, case: Case, rounds: int) -> int:
        seconds: list[tuple[float, int]] = []
        for flash in (0, 1):
            self._start(case, rounds, flash)
            seconds.append((self.run(), flash))
            self.release()
        return min(seconds)[1]

    def _start(self, case: Case, rounds: int, flash: int) -> None:
        api = self._api
        params = api.llama_context_default_params()
        per_sequence = case.prompt if case.op == "prefill" else case.context + case.steps * (rounds + 4)
        params.n_ctx = case.batch * (-(-(per_sequence + 64) // 256) * 256)
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = case.batch
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = flash
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("llama.cpp cannot make a context")
        self._batch = api.llama_batch_init(max(CHUNK, case.batch), 0, 1)
        self._case = case
        if case.op == "decode":
            for sequence in range(case.batch):
                self._read(sequence, case.context)
            self._position = case.context

    def run(self) -> float:
        """Read one prompt, or take the case's steps."""
        assert self._case is not None
        if self._case.op == "prefill":
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
            started = time.perf_counter()
            self._read(0, self._case.prompt)
            return time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(self._case.steps):
            rows = [(self._position, sequence, True) for sequence in range(self._case.batch)]
            self._decode(rows)
            self._position += 1
        return time.perf_counter() - started

    def release(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
        self._context = None

    def _read(self, sequence: int, length: int) -> None:
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            self._decode([(position, sequence, position == length - 1) for position in range(start, stop)])

    def _decode(self, rows: Sequence[tuple[int, int, bool]]) -> None:
        """Compute rows of (position, sequence, whether its logits are wanted), with arbitrary tokens."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (position, sequence, wanted) in enumerate(rows):
            batch.token[index] = 300 + (position * 7919 + sequence * 104729) % (self._vocab_size - 300)
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        code = self._api.llama_decode(self._context, batch)
        if code != 0:
            raise ValueError(f"llama_decode returned {code}")
        self._api.llama_synchronize(self._context)


if __name__ == "__main__":
    serve(LlamaPeer)
