"""What training changes: the matrices of a LoRA adapter, or every weight of the model.

Owns how they begin and how they are written down for the engine. Knows nothing of optimisers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from bise.config import ModelConfig
from bise.errors import ConfigError
from bise.kernels.torch import TorchLora, TorchOps
from bise.model.lora import BASE_HASH, CONFIG_FILE, MAX_RANK, MODULES, WEIGHTS_FILE
from bise.model.source import ModelSource
from bise.model.transformer import weight_shapes
from bise.train.network import Network, Tensors, read_frozen, read_weights, shards_of

TARGETS = tuple(MODULES.values())


class Trainable(Protocol):
    """Parameters, and the network that they are part of."""

    params: Tensors
    """Leaf tensors in float32, by name."""
    network: Network

    def loras(self) -> Mapping[str, TorchLora]:
        """Return the adapter's matrices; empty when the weights themselves are trained."""
        ...


class LoraParameters:
    """An adapter of one rank over a frozen model: W x + alpha / rank * B A x."""

    def __init__(
        self,
        source: ModelSource,
        ops: TorchOps,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        seed: int,
        base_bits: int | None = None,
        recompute: bool = False,
        sharded: bool = False,
    ) -> None:
        """Begin with B = 0, so that nothing changes, and A uniform as PEFT draws it. The model's matrices are
        kept in `base_bits` bits, None: in the compute dtype.
        """
        _check(source.config, rank, alpha, targets)
        self.rank, self.alpha, self.targets = rank, alpha, tuple(targets)
        # Kept in the compute dtype: frozen weights need no more, and are not cast at every use.
        device = str(ops.device)
        if sharded and base_bits is not None:
            raise ConfigError("--base: matrices in few bits are not sharded; use none", field="base")
        frozen = (
            read_weights(source, device, ops.dtype, has_shards=sharded)
            if base_bits is None
            else read_frozen(source, device, ops.dtype, base_bits)
        )
        shards = shards_of(source, device, ops.dtype, is_trained=False) if sharded else None
        self.network = Network(source.config, frozen, ops, recompute=recompute, shards=shards)
        generator = torch.Generator().manual_seed(seed)
        self.params: Tensors = {}
        for name, shape in weight_shapes(source.config).items():
            if name.rpartition(".")[2] not in targets:
                continue
            bound = 1 / math.sqrt(shape[1])
            first = (torch.rand(rank, shape[1], generator=generator) * 2 - 1) * bound
            self.params[f"{name}.a"] = first.to(ops.device).requires_grad_()
            self.params[f"{name}.b"] = torch.zeros(shape[0], rank, device=ops.device).requires_grad_()

    def loras(self) -> Mapping[str, TorchLora]:
        """Return (A, B, scale) by the name of the weight."""
        scale = self.alpha / self.rank
        names = [name[:-2] for name in self.params if name.endswith(".a")]
        return {name: (self.params[f"{name}.a"], self.params[f"{name}.b"], scale) for name in names}


class FullParameters:
    """Every weight of the model."""

    def __init__(
        self, source: ModelSource, ops: TorchOps, *, recompute: bool = False, sharded: bool = False
    ) -> None:
        """Begin with the stored values, in float32."""
        device = str(ops.device)
        self.params = {
            name: weight.requires_grad_()
            for name, weight in read_weights(source, device, has_shards=sharded).items()
        }
        shards = shards_of(source, device, torch.float32, is_trained=True) if sharded else None
        self.network = Network(source.config, self.params, ops, recompute=recompute, shards=shards)
        if sharded:
            self.params = self.network.parameters()

    def loras(self) -> Mapping[str, TorchLora]:
        """Return nothing: there is no adapter."""
        return {}


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    parameters: LoraParameters,
    *,
    base_name: str,
    base_sha256: str,
) -> None:
    """Write an adapter in PEFT's layout into an existing directory; `tensors` are the values to write."""
    parts = {weight: module for module, weight in MODULES.items()}
    stored: Tensors = {}
    for name, tensor in tensors.items():
        _, layer, weight, half = name.split(".")
        module = f"base_model.model.model.layers.{layer}.{parts[weight]}"
        stored[f"{module}.lora_{half.upper()}.weight"] = tensor.detach().cpu().contiguous()
    save_file(stored, directory / WEIGHTS_FILE, metadata={BASE_HASH: base_sha256})
    (directory / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it private
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": parameters.rank,
        "lora_alpha": parameters.alpha,
        "lora_dropout": 0.0,
        "target_modules": [parts[target].partition(".")[2] for target in parameters.targets],
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adaptable(config: ModelConfig) -> tuple[str, ...]:
    """Return the matrices of a model that an adapter can change; experts cannot be adapted."""
    return TARGETS[:4] if config.is_moe else TARGETS


def _check(config: ModelConfig, rank: int, alpha: float, targets: Sequence[str]) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"--rank must be from 1 to {MAX_RANK}, got {rank}", field="rank")
    if not 0 < alpha <= 1e6:
        raise ConfigError(f"--alpha must be above 0 and at most 1e6, got {alpha:g}", field="alpha")
    allowed = adaptable(config)
    for target in targets:
        if target not in allowed:
            raise ConfigError(
                f"--targets: '{target}' cannot be adapted here; what can: {', '.join(allowed)}",
                field="targets",
            )
