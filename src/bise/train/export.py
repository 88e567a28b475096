"""Writing a whole model: Hugging Face's layout, from trained weights or from a base and its adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from bise.errors import ConfigError
from bise.model.lora import check_base, load_adapter, open_adapter
from bise.model.packed import content_hash
from bise.model.source import ModelSource
from bise.model.tensor_names import hf_location
from bise.model.transformer import weight_shapes
from bise.train.network import Tensors, read_weights, torch_ops

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def require_layout(source: ModelSource) -> None:
    """Raise ConfigError unless the model is one that `write_model` can write again."""
    if source.kind != "safetensors" or source.config.is_moe:
        kind = "a mixture of experts" if source.config.is_moe else f"of kind {source.kind}"
        raise ConfigError(
            f"{source.path} is {kind}; whole models are written for dense ones in Hugging Face's layout; "
            "train an adapter (--method lora) instead",
            field="model",
        )


def write_model(directory: Path, source: ModelSource, weights: Mapping[str, Tensor]) -> None:
    """Write weights by bise's names into an existing directory, in the dtypes of the model they come from,
    with its configuration and tokenizer beside them.
    """
    require_layout(source)
    stored: Tensors = {}
    for name, shape in weight_shapes(source.config).items():
        location = hf_location(name, shape, source.config, ())
        dtype = _DTYPES[source.tensors[name].format]
        stored[location.stored_name] = weights[name].detach().to("cpu", dtype).contiguous()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it private
    for file in sorted(source.path.iterdir()):
        if (
            file.is_file()
            and file.suffix in (".json", ".jinja", ".model", ".txt")
            and not file.name.endswith(_NOT_COPIED)
        ):
            shutil.copyfile(file, directory / file.name)


def merged_weights(source: ModelSource, adapter: Path) -> Tensors:
    """Return the base's weights with an adapter's products added, in float32."""
    file = open_adapter(adapter, source.config)
    check_base(file, lambda: content_hash(source))
    weights = read_weights(source, "cpu")
    loaded = load_adapter(file, torch_ops("f32", "cpu"))
    for name, (a, b, scale) in loaded.loras.items():
        weights[name] += scale * (b @ a)
    return weights
