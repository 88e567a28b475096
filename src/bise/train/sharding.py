"""Training in several processes: the layers' matrices sharded with FSDP2, each step's samples shared out.

Start it with `torchrun --nproc-per-node N -m bise tune run ...`: NCCL on GPUs, gloo on CPUs. Each process
reads its own rows of the matrices from the model's files; embeddings, norms, routers and the output are whole
in each. The first process alone tells, saves and publishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from bise.config import ModelConfig
from bise.kernels import Array, Pages
from bise.kernels.torch import TorchOps
from bise.model.batch import Batch
from bise.model.transformer import Block, Transformer, weight_shapes

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
            if isinstance(param, DTensor):
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
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            parts[isinstance(grad, DTensor)] += float(local.double().square().sum())
        norm = math.sqrt(self.total(parts[True]) + parts[False])
        if norm > bound:
            for param in params.values():
                assert param.grad is not None
                param.grad.mul_(bound / (norm + 1e-6))
        return norm

    def close(self) -> None:
        """Leave."""
        if self.is_many:
            distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on this process alone; gathered from all of them when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds, sharing their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """Return which rows [start, end) of a tensor this process holds."""
    count = tensor.shape[0]
    if not isinstance(tensor, DTensor):
        return 0, count
    mesh = tensor.device_mesh
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


class ShardedTransformer(Transformer):
    """The network whose matrices lie in shards; a layer's are gathered when it runs, both ways."""

    def __init__(
        self,
        config: ModelConfig,
        whole: Mapping[str, Tensor],
        shards: Shards,
        ops: TorchOps,
        *,
        recompute: bool,
    ) -> None:
        """Take what every process holds whole, and read this process's rows of the rest."""
        self._whole, self._recompute = dict(whole), recompute
        shapes = weight_shapes(config)
        mesh = init_device_mesh(ops.device.type, (distributed.get_world_size(),))
        self._layers = nn.ModuleList()
        for index in range(config.num_layers):
            prefix = f"layers.{index}."
            own = {
                name.removeprefix(prefix): shape
                for name, shape in shapes.items()
                if name.startswith(prefix) and lies_in_shards(name, shape)
            }
            layer = _Layer(own, shards, mesh)
            for name, param in layer.matrices().items():
                with torch.no_grad():
                    here(param).copy_(shards.read(prefix + name, *rows_here(param)))
            self._layers.append(layer)
        nothing = torch.empty(0)
        super().__init__(config, {name: self._whole.get(name, nothing) for name in shapes}, ops)

    def parameters(self) -> dict[str, Tensor]:
        """Return every weight by bise's names: shards of the layers' matrices, the others whole."""
        found: dict[str, Tensor] = dict(self._whole)
        for index, layer in enumerate(self._layers):
            found |= {
                f"layers.{index}.{name}": param for name, param in cast(_Layer, layer).matrices().items()
            }
        return found

    def _layer(
        self, index: int, x: Array, h: Array, rope: Array, batch: Batch, pages: Pages | None
    ) -> tuple[Array, Array]:
        return self._layers[index](self, index, x, h, rope, batch, pages)

    def run_block(self, index: int, layer: _Layer, *args: Any) -> Any:
        """Run a block over the matrices of a layer, which are whole for the moment."""
        run = partial(self._run_block, index, layer)
        # torch's annotations leave its result open
        return cast(Any, checkpoint(run, *args, use_reentrant=False)) if self._recompute else run(*args)

    def _run_block(self, index: int, layer: _Layer, *args: Any) -> Any:
        prefix = f"layers.{index}."
        named = {prefix + name: tensor for name, tensor in layer.matrices().items()}
        before = self._blocks[index]
        self._blocks[index] = Block(self.config, index, {**self._whole, **named}, self._ops)
        try:
            return super()._layer(index, *args)
        finally:
            self._blocks[index] = before


class _Layer(nn.Module):
    """The matrices of one layer, in shards."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], shards: Shards, mesh: DeviceMesh) -> None:
        super().__init__()
        self._names = {name.replace(".", "__"): name for name in shapes}
        for name, shape in shapes.items():
            empty = torch.empty(*shape, dtype=shards.dtype, device="meta")  # no process ever holds it whole
            own = nn.Parameter(empty, requires_grad=shards.is_trained)
            self.register_parameter(name.replace(".", "__"), own)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        self.to_empty(device=mesh.device_type)

    def matrices(self) -> dict[str, Tensor]:
        """Return the parameters as they are now: shards, or whole inside of `forward`."""
        return {name: getattr(self, own) for own, name in self._names.items()}

    def forward(self, model: ShardedTransformer, index: int, *args: Any) -> Any:
        """Run the layer's block."""
        return model.run_block(index, self, *args)
