"""Training in several processes: the layers' matrices sharded with FSDP2, each step's samples shared out.

Start it with `torchrun --nproc-per-node N -m bise tune run ...`: NCCL on GPUs, gloo on CPUs. Each process
reads its own rows of the matrices from the model's files; embeddings, norms, routers and the output are whole
in each. The first process alone tells, saves and publishes. What runs over shards is `sharded_network`: a run
of one process never imports it, nor torch's sharded tensors, which add half to the time that torch takes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


class Ranks:
    """The processes of one run: alone, unless torchrun started several."""

    def __init__(self, device: str = "cpu") -> None:
        """Join the others, who compute on such devices too."""
        self.is_many = distributed.is_available() and distributed.is_torchelastic_launched()
        self.rank, self.count, self._device = 0, 1, device
        if self.is_many:
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
            if device.startswith("cuda"):
                torch.cuda.set_device(self.rank % torch.cuda.device_count())

    @property
    def is_first(self) -> bool:
        """True in the process that tells, saves and publishes."""
        return self.rank == 0

    def share(self, items: Sequence[T], rank: int) -> list[T]:
        """Return a process's share of the items of a step."""
        return list(items[rank :: self.count])

    def wait(self) -> None:
        """Wait until all are here."""
        if self.is_many:
            distributed.barrier()  # pyright: ignore[reportUnknownMemberType]

    def total(self, value: float) -> float:
        """Return the sum of every process's value."""
        if not self.is_many:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        distributed.all_reduce(tensor)  # pyright: ignore[reportUnknownMemberType]
        return float(tensor)

    def most(self, value: int) -> int:
        """Return the largest of every process's value."""
        if not self.is_many:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self._device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]
        return int(tensor)

    def agree(self, flag: bool) -> bool:
        """Return True when any process says so."""
        return self.total(float(flag)) > 0

    def add_gradients(self, params: Mapping[str, Tensor]) -> None:
        """Sum the gradients of what every process holds whole; those of shards are averages so far."""
        if not self.is_many:
            return
        for param in params.values():
            if _shard(param) is not None:
                if param.grad is not None:  # FSDP left the mean
                    param.grad.mul_(self.count)
                continue
            if param.grad is None:  # nothing of this process's share led through it
                param.grad = torch.zeros_like(param)
            distributed.all_reduce(param.grad)  # pyright: ignore[reportUnknownMemberType]

    def clip(self, params: Mapping[str, Tensor], bound: float) -> float:
        """Scale the gradients down to a norm of `bound` at most; return the norm that they had."""
        if not self.is_many:
            return float(nn.utils.clip_grad_norm_(list(params.values()), bound, foreach=False))
        parts = {True: 0.0, False: 0.0}
        for param in params.values():
            grad = param.grad
            assert grad is not None
            parts[_shard(grad) is not None] += float(here(grad).double().square().sum())
        norm = math.sqrt(self.total(parts[True]) + parts[False])
        if norm > bound:
            for param in params.values():
                assert param.grad is not None
                param.grad.mul_(bound / (norm + 1e-6))
        return norm

    def close(self, code: int = 0) -> None:
        """Leave, once all is said: ends this process with `code` when it is one of several."""
        if not self.is_many:
            return
        distributed.destroy_process_group()
        # PyTorch's threads for gloo, which nothing joins, may still hold a tensor of Python's; to let it go
        # while the interpreter ends aborts the process, and torchrun then calls a finished run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _shard(tensor: Tensor) -> DTensor | None:
    """Return a tensor that is sharded; None for one that is whole, as all are where nobody made shards."""
    module = sys.modules.get("torch.distributed.tensor")
    return cast("DTensor", tensor) if module is not None and isinstance(tensor, module.DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on this process alone; gathered from all of them when it is sharded."""
    shard = _shard(tensor)
    return tensor if shard is None else shard.full_tensor()


def here(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds, sharing their memory."""
    shard = _shard(tensor)
    return tensor if shard is None else shard.to_local()


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """Return which rows [start, end) of a tensor this process holds."""
    count, shard = tensor.shape[0], _shard(tensor)
    if shard is None:
        return 0, count
    mesh = shard.device_mesh
    share = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * share, count)
    return start, start + here(tensor).shape[0]


def lies_in_shards(name: str, shape: Sequence[int]) -> bool:
    """Say whether a weight's rows are shared out: the layers' matrices, but for routers."""
    return name.startswith("layers.") and len(shape) == 2 and not name.endswith("router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Where the rows of the layers' matrices come from, and what becomes of them."""

    read: Callable[[str, int, int], Tensor]
    """Returns rows [start, end) of a weight, in `dtype`."""
    dtype: torch.dtype
    is_trained: bool
