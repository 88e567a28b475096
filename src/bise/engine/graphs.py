"""Decode steps as recorded command lists: the device gets one command instead of some two hundred.

Steps in which every sequence brings one row are recorded at start, once for each of some sizes, over buffers
that never move. A step is copied into the buffers of the next larger size and replayed; rows that only fill
it up stand at position -1 and store nothing. Everything else, prompts and guesses and adapters, runs as it
is. The kernels are the same ones, so the bits are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.config import ModelConfig
from bise.engine.runner import Model
from bise.engine.split import recorded_rows
from bise.kernels import BLOCK_SIZE, Array, AttentionMeta
from bise.kernels.triton import compute_on
from bise.kernels.triton.paging import Placed
from bise.model.batch import Batch, IntArray
from bise.model.transformer import LayerPages

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records what a device is told to compute."""

    def record(
        self, run: Callable[[], tuple[Array, Tensor]]
    ) -> tuple[tuple[Array, Tensor], Callable[[], None]]:
        """Call `run` once, noting its commands; returns what it returned and what issues the commands anew,
        which fills the same memory.
        """
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    _recording = Lock()
    """Of the process: before a thread records PyTorch waits for the device, which breaks off what another one
    records.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Its own: torch's is one of the process, and lies on the device that recorded first.
        self._stream = torch.cuda.Stream(device)

    def record(
        self, run: Callable[[], tuple[Array, Tensor]]
    ) -> tuple[tuple[Array, Tensor], Callable[[], None]]:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # Other models' threads may allocate meanwhile: only this thread's calls are held to the rules.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with self._recording, torch.cuda.device(self._device), recording:
            found = run()
        return found, graph.replay


class Replayed:
    """Hidden states of a replayed step, and its logits; valid until the next step."""

    def __init__(self, hidden: Array, logits: Tensor, count: int) -> None:
        self._hidden = hidden
        self._count = count
        self.logits = logits[:count]
        """[T, V]."""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Array:
        return self._hidden[: self._count][index]


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    hidden: Array
    logits: Tensor


class StepBuffers:
    """Where recorded steps of one size find their rows: one piece of memory, filled by one copy."""

    def __init__(self, rows: int, widths: Sequence[int], device: torch.device) -> None:
        """Hold `rows` rows, and for each window group a table of so many blocks for each."""
        self.rows = rows
        lengths = [rows, rows] + [length for width in widths for length in (rows, rows * width)]
        total = sum(lengths)
        self._host = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.empty(total, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        host: npt.NDArray[np.int32] = self._host.numpy()
        ends = np.cumsum(lengths)[:-1]
        self._ids, self._positions, *pairs = np.split(host, ends)
        self._slots = pairs[0::2]
        self._tables = [table.reshape(rows, -1) for table in pairs[1::2]]
        parts: Sequence[Tensor] = torch.split(self._device, lengths)
        ids, positions, *placed = parts
        owners = torch.arange(rows, dtype=torch.int32, device=device)
        groups = [
            Placed(
                positions, owners, placed[2 * index], placed[2 * index + 1].view(rows, width), is_decode=True
            )
            for index, width in enumerate(widths)
        ]
        # The ops of a device that can record take tensors where others have arrays.
        self.batch = Batch(
            token_ids=cast(IntArray, ids),
            positions=cast(IntArray, positions),
            attention=cast("tuple[AttentionMeta, ...]", tuple(groups)),
            logit_rows=np.arange(rows, dtype=np.int32),
        )

    def fill(self, batch: Batch | None) -> None:
        """Bring a step of at most `rows` rows to the device, in one copy that later commands wait for; None:
        only rows that fill up.
        """
        if self._copied is not None:
            self._copied.synchronize()  # a step of which nothing was read may be on its way yet
        self._host.fill_(-1)
        self._ids[:] = 0
        count = 0 if batch is None else len(batch.token_ids)
        if batch is not None:
            self._ids[:count] = batch.token_ids
            self._positions[:count] = batch.positions
            for meta, slots, table in zip(batch.attention, self._slots, self._tables, strict=True):
                slots[:count] = meta.slots
                table[:count, : meta.block_table.shape[1]] = meta.block_table
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))


class GraphedModel:
    """A model whose decode steps are recorded; see `engine.runner.Model`."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        *,
        max_rows: int,
        max_context: int,
        sizes: Sequence[int] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Record steps of up to `max_rows` rows, or of `sizes` alone, of texts of up to `max_context` tokens;
        on CUDA unless another `recorder` is given.
        """
        self.config: ModelConfig = model.config
        self._model = model
        self._device = device
        self._recorder = recorder or CudaRecorder(device)
        self._sizes = recorded_rows(max_rows) if sizes is None else sorted(sizes)
        self._context = max_context
        self._width = -(-max_context // BLOCK_SIZE)
        self._cache: LayerPages | None = None
        self._steps: dict[int, tuple[StepBuffers, _Recorded]] = {}
        self.num_replayed = 0
        """Steps that were replayed."""

    def prepare(self, cache: LayerPages) -> None:
        """Warm up and record steps over the pages of `cache`. Where the device cannot record, steps run as
        they are.
        """
        self._cache = cache
        self._reach_last_position(cache)
        try:
            for size in reversed(self._sizes):  # the largest first: the others find room in its memory
                self._steps[size] = self._record(size, cache)
        except RuntimeError as error:
            self._steps.clear()
            logger.warning("event=graphs_off reason=%r", str(error).partition("\n")[0])

    def _reach_last_position(self, cache: LayerPages) -> None:
        """Run a row at the last position, whose tables of angles recorded steps share."""
        widths = [self._width] * len(self.config.window_groups)
        nowhere = np.full(1, -1, np.int32)
        metas = tuple(
            AttentionMeta(
                q_start=np.array([0, 1], np.int32),
                q_pos=np.array([self._context - 1], np.int32),
                block_table=np.full((1, width), -1, np.int32),
                slots=nowhere,
            )
            for width in widths
        )
        position = np.array([self._context - 1], np.int32)
        batch = Batch(np.zeros(1, np.int32), position, metas, np.zeros(1, np.int32))
        self._model.logits(self._model.forward(batch, cache))

    def _record(self, size: int, cache: LayerPages) -> tuple[StepBuffers, _Recorded]:
        buffers = StepBuffers(size, [self._width] * len(self.config.window_groups), self._device)
        buffers.fill(None)

        def run() -> tuple[Array, Tensor]:
            hidden = self._model.forward(buffers.batch, cache)
            return hidden, cast(Tensor, self._model.logits(hidden))

        run()  # compiles the kernels of this size: nothing may be compiled while it is recorded
        (hidden, logits), replay = self._recorder.record(run)
        return buffers, _Recorded(replay, hidden, logits)

    def forward(self, batch: Batch, cache: LayerPages | None = None) -> Array:
        """See `Model.forward`."""
        rows = len(batch.token_ids)
        is_decode = all(len(meta.q_pos) == rows for meta in batch.attention)
        fits = all(meta.block_table.shape[1] <= self._width for meta in batch.attention)
        size = next((size for size in self._sizes if size >= rows and size in self._steps), None)
        if size is None or cache is not self._cache or batch.adapted or not is_decode or not fits:
            return self._model.forward(batch, cache)
        buffers, recorded = self._steps[size]
        compute_on(self._device)
        buffers.fill(batch)
        recorded.replay()
        self.num_replayed += 1
        return Replayed(recorded.hidden, recorded.logits, rows)

    def logits(self, hidden: Array) -> Array:
        """See `Model.logits`."""
        return hidden.logits if isinstance(hidden, Replayed) else self._model.logits(hidden)
