"""The loss of a model over whole texts, differentiable: `model.transformer` over the torch backend.

Texts lie end to end in one pass, so nothing is computed for padding, and none sees another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from bise.config import ModelConfig
from bise.errors import ConfigError
from bise.kernels import Array, Pages
from bise.kernels.torch import TorchLora, TorchOps
from bise.model.batch import AdaptedRows, Batch, texts_batch
from bise.model.source import ModelSource
from bise.model.transformer import Transformer, weight_shapes
from bise.text.turns import LearnedText
from bise.train.quantised import FrozenMatrix, FrozenOps
from bise.train.sharding import Shards, lies_in_shards

if TYPE_CHECKING:
    from bise.train.sharded_network import ShardedTransformer

Tensors = dict[str, Tensor]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}


class _Recomputing(Transformer):
    """The network with gradient checkpointing: a block at a time."""

    def _layer(
        self, index: int, x: Array, h: Array, rope: Array, batch: Batch, pages: Pages | None
    ) -> tuple[Array, Array]:
        block = partial(super()._layer, index)
        # torch's annotations leave its result open
        return cast("tuple[Array, Array]", checkpoint(block, x, h, rope, batch, pages, use_reentrant=False))


def torch_ops(dtype: str, device: str) -> TorchOps:
    """Return the backend for `f32` or `bf16` on `cpu` or `cuda`, which takes matrices frozen in few bits too;
    ConfigError when there is no such device.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu", field="device"
        )
    return FrozenOps(DTYPES[dtype], device)


def read_weights(
    source: ModelSource, device: str, dtype: torch.dtype = torch.float32, *, has_shards: bool = False
) -> Tensors:
    """Return every weight of a model on disk, by its name; `has_shards`: without those that lie in
    shards.
    """
    return {
        name: _read(source, device, dtype, name, 0, shape[0])
        for name, shape in weight_shapes(source.config).items()
        if not (has_shards and lies_in_shards(name, shape))
    }


def shards_of(source: ModelSource, device: str, dtype: torch.dtype, *, is_trained: bool) -> Shards:
    """Return where a model's shards come from: its files, row by row."""
    return Shards(read=partial(_read, source, device, dtype), dtype=dtype, is_trained=is_trained)


def _read(source: ModelSource, device: str, dtype: torch.dtype, name: str, start: int, end: int) -> Tensor:
    return torch.from_numpy(source.tensors[name].floats(start, end)).to(device, dtype)  # pyright: ignore[reportUnknownMemberType]


def read_frozen(
    source: ModelSource, device: str, dtype: torch.dtype, bits: int
) -> dict[str, Tensor | FrozenMatrix]:
    """Return every weight of a model on disk, the matrices in `bits` bits: all but the embeddings, which are
    looked up, and routers, which decide. One float32 matrix at a time is in memory.
    """
    weights: dict[str, Tensor | FrozenMatrix] = {}
    for name, shape in weight_shapes(source.config).items():
        values = source.tensors[name].floats(0, shape[0])
        if len(shape) == 2 and name != "tok_embeddings" and not name.endswith("router"):
            weights[name] = FrozenMatrix(values, bits, device)
        else:
            weights[name] = torch.from_numpy(values).to(device, dtype)  # pyright: ignore[reportUnknownMemberType]
    return weights


class Network:
    """A model that computes losses."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor | FrozenMatrix],
        ops: TorchOps,
        *,
        recompute: bool = False,
        shards: Shards | None = None,
    ) -> None:
        """Compute on `ops`; the tensors stay the caller's, who may train them. `recompute` keeps the inputs
        of each block alone for the way back, and computes the rest again: the same bits, less memory.
        With `shards`, each of several processes reads and keeps a share of the layers' matrices, which are
        not in `weights` then; see `parameters`.
        """
        self._groups = len(config.window_groups)
        self._ops = ops
        given = cast(Mapping[str, Tensor], weights)
        self._sharded: ShardedTransformer | None = None
        self._model: Transformer
        if shards is not None:
            from bise.train.sharded_network import ShardedTransformer

            self._model = self._sharded = ShardedTransformer(config, given, shards, ops, recompute=recompute)
        else:
            self._model = (_Recomputing if recompute else Transformer)(config, given, ops)

    @property
    def is_sharded(self) -> bool:
        """True when each of several processes keeps a share of the matrices."""
        return self._sharded is not None

    def parameters(self) -> Tensors:
        """Return the weights of a sharded model by name: this process's shards, and what all hold whole."""
        assert self._sharded is not None
        return self._sharded.parameters()

    def token_losses(
        self, texts: Sequence[LearnedText], loras: Mapping[str, TorchLora] | None = None
    ) -> Tensor:
        """Return the loss in nats of every learned token, text after text, in float32 at least."""
        batch = texts_batch([text.ids[:-1] for text in texts], self._groups)
        if loras:
            rows = np.arange(len(batch.token_ids), dtype=np.intp)
            batch = batch.with_adapters((AdaptedRows(loras, rows),))
        learned = np.concatenate([np.asarray(text.learned[1:]) for text in texts])
        targets = np.concatenate([np.asarray(text.ids[1:], np.int64) for text in texts])
        index = torch.as_tensor(np.flatnonzero(learned), device=self._ops.device)
        logits = self._model.logits(self._model.forward(batch).index_select(0, index))
        wanted = torch.as_tensor(targets[learned], device=self._ops.device)
        return functional.cross_entropy(logits, wanted, reduction="none")
