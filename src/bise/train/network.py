"""The loss of a model over whole texts, differentiable: `model.transformer` over the torch backend.

Texts lie end to end in one pass, so nothing is computed for padding, and none sees another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bise.config import ModelConfig
from bise.errors import ConfigError
from bise.kernels.torch import TorchLora, TorchOps
from bise.model.batch import AdaptedRows, texts_batch
from bise.model.source import ModelSource
from bise.model.transformer import Transformer, weight_shapes
from bise.text.turns import LearnedText

Tensors = dict[str, Tensor]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}


def torch_ops(dtype: str, device: str) -> TorchOps:
    """Return the backend for `f32` or `bf16` on `cpu` or `cuda`; ConfigError when there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu", field="device"
        )
    return TorchOps(DTYPES[dtype], device)


def read_weights(source: ModelSource, device: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return every weight of a model on disk, by the names of `weight_shapes`."""
    return {
        name: torch.from_numpy(source.tensors[name].floats(0, shape[0])).to(device, dtype)  # pyright: ignore[reportUnknownMemberType]
        for name, shape in weight_shapes(source.config).items()
    }


class Network:
    """A model that computes losses."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], ops: TorchOps) -> None:
        """Compute on `ops`; the tensors stay the caller's, who may train them."""
        self._groups = len(config.window_groups)
        self._ops = ops
        self._model = Transformer(config, weights, ops)

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


def passes(texts: Sequence[LearnedText], max_tokens: int) -> Iterator[list[LearnedText]]:
    """Yield the texts in order, as many at a time as `max_tokens` tokens hold, at least one."""
    group: list[LearnedText] = []
    tokens = 0
    for text in texts:
        if group and tokens + len(text.ids) > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(text)
        tokens += len(text.ids)
    if group:
        yield group
