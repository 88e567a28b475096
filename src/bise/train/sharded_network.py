"""The network of a run in several processes: a layer's matrices lie in shards, whole while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from bise.config import ModelConfig
from bise.kernels import Array, Pages
from bise.kernels.torch import TorchOps
from bise.model.batch import Batch
from bise.model.transformer import Block, Transformer, weight_shapes
from bise.train.sharding import Shards, here, lies_in_shards, rows_here


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
