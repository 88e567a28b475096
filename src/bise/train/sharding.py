"""Training in several processes: the layers' matrices sharded with FSDP2, each step's samples shared out.

Start it with `torchrun --nproc-per-node N -m bise tune run ...`: NCCL on GPUs, gloo on CPUs. The first
process alone tells, saves and publishes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bise.config import ModelConfig
from bise.kernels import Array, Pages
from bise.kernels.torch import TorchOps
from bise.model.batch import Batch
from bise.model.transformer import Block, Transformer

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


def shaped_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, laid out as `pattern` is."""
    if not isinstance(pattern, DTensor):
        return tensor.to(pattern.device)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)


class ShardedTransformer(Transformer):
    """The network whose matrices lie in shards; a layer's are gathered when it runs, both ways."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], ops: TorchOps) -> None:
        """Take whole weights, the same in every process, and keep this process's shards of them."""
        self.root = _Root(config, weights)
        nothing = torch.empty(0)
        super().__init__(config, {name: self.root.whole.get(name, nothing) for name in weights}, ops)

    def parameters(self) -> dict[str, Tensor]:
        """Return every weight by bise's names: shards of the layers' matrices, the others whole."""
        found: dict[str, Tensor] = dict(self.root.whole)
        for index, layer in enumerate(self.root.layers):
            found |= {
                f"layers.{index}.{name}": param for name, param in cast(_Layer, layer).matrices().items()
            }
        return found

    def _layer(
        self, index: int, x: Array, h: Array, rope: Array, batch: Batch, pages: Pages | None
    ) -> tuple[Array, Array]:
        return self.root.layers[index](self, index, x, h, rope, batch, pages)

    def run_block(self, index: int, matrices: Mapping[str, Tensor], *args: Any) -> Any:
        """Run a block over matrices that are whole for the moment."""
        prefix = f"layers.{index}."
        named = {prefix + name: tensor for name, tensor in matrices.items()}
        before = self._blocks[index]
        self._blocks[index] = Block(self.config, index, {**self.root.whole, **named}, self._ops)
        try:
            return super()._layer(index, *args)
        finally:
            self._blocks[index] = before


class _Root(nn.Module):
    """What every process holds whole (embeddings, norms, routers, output), and the layers."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        sharded: set[str] = set()
        for index in range(config.num_layers):
            prefix = f"layers.{index}."
            own = {
                name.removeprefix(prefix): weight
                for name, weight in weights.items()
                if name.startswith(prefix) and weight.ndim == 2 and not name.endswith("router")
            }
            sharded |= {prefix + name for name in own}
            layer = _Layer(own)
            fully_shard(layer, reshard_after_forward=True)
            self.layers.append(layer)
        self.whole = {name: weight for name, weight in weights.items() if name not in sharded}


class _Layer(nn.Module):
    """The matrices of one layer."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {name.replace(".", "__"): name for name in weights}
        for name, weight in weights.items():
            own = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            self.register_parameter(name.replace(".", "__"), own)

    def matrices(self) -> dict[str, Tensor]:
        """Return the parameters as they are now: shards, or whole inside of `forward`."""
        return {name: getattr(self, own) for own, name in self._names.items()}

    def forward(self, model: ShardedTransformer, index: int, *args: Any) -> Any:
        """Run the layer's block."""
        return model.run_block(index, self.matrices(), *args)
