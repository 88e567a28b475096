"""Whole models in the layout they came in: Hugging Face's or Mistral's names, the stored widths.

One tensor at a time is in memory. What lies beside the weights (configuration, tokenizer) is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bise.errors import ConfigError, ModelFileError
from bise.model.gguf import paired_rows
from bise.model.source import ModelSource
from bise.model.tensor_names import Location, hf_location, mistral_location
from bise.model.transformer import weight_shapes
from bise.train.whole import Floats

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_COPIED = (".json", ".jinja", ".model", ".txt")
_NOT_COPIED = (".index.json",)
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
"""How files begin that go wherever the weights go."""
CARD = "README.md"
_VERSIONED = ".model."


def require_layout(source: ModelSource) -> None:
    """Raise ConfigError unless the model is one that `write_model` can write again."""
    if source.kind not in ("safetensors", "mistral"):
        raise ConfigError(
            f"{source.path} is a {source.kind} file; whole models are written only where they came as "
            "safetensors; train an adapter (--method lora), then `bise tune export` it to GGUF",
            field="model",
        )


def write_model(directory: Path, source: ModelSource, values: Callable[[str], Floats]) -> None:
    """Write the weights `values` by bise's names into an existing directory, in the layout and the widths of
    the model they come from, with its configuration, its tokenizer and its licence beside them.

    Raises ModelFileError for a value that the stored width cannot hold.
    """
    require_layout(source)
    name = "model.safetensors" if source.kind == "safetensors" else "consolidated.safetensors"
    shapes = weight_shapes(source.config)

    def stored(weight: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        rows = values(weight).reshape(shape)
        width = _location(source, weight).pair_width
        if width:
            paired = np.empty_like(rows)
            paired[paired_rows(0, len(rows), width)] = rows
            rows = paired
        return narrowed(rows, source.tensors[weight].format, weight)

    write_tensors(
        directory / name,
        [
            (_location(source, weight).stored_name, source.tensors[weight].format, shape)
            for weight, shape in shapes.items()
        ],
        (stored(weight, shape) for weight, shape in shapes.items()),
    )
    for path in sorted(source.path.iterdir()):
        named = path.suffix in _COPIED or _VERSIONED in path.name or path.name.startswith(_LICENCES)
        if path.is_file() and named and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    (directory / CARD).write_text(_card(source), encoding="utf-8")


def _card(source: ModelSource) -> str:
    """Return a card that names the licence and the model that this one comes from, whose card tells more."""
    name = source.name or source.path.name
    facts = {"license": source.licence, "base_model": name}
    # A JSON string is a YAML one.
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items() if value]
    told = f"Written by bise from {name}, whose card tells how that was made."
    return "\n".join(["---", *front, "---", told, ""])


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    values: Iterable[npt.NDArray[np.generic]],
) -> None:
    """Write a safetensors file of (name, format, shape), F32, F16 or BF16, and the values of each in order,
    of which one at a time is asked for.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, form, shape in tensors:
        start, end = end, end + math.prod(shape) * _BYTES[form]
        header[name] = {"dtype": form, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in values:
            file.write(array.tobytes())
        if file.tell() != 8 + len(text) + end:
            raise AssertionError(f"{path}: the tensors written are not those announced")


def narrowed(values: Floats, form: str, name: str) -> npt.NDArray[np.generic]:
    """Return float32 values as F32, F16 or BF16 (the bits), rounded to the nearest, ties to even.

    Raises ModelFileError for a value beyond the format's range.
    """
    if form == "F32":
        return np.ascontiguousarray(values, "<f4")
    if form == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        if not np.isfinite(halves).all():
            raise ModelFileError(
                f"{name} has the value {np.abs(values).max():g}, beyond float16's 65504; write BF16",
                field=name,
            )
        return halves
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        "<u2"
    )


def _location(source: ModelSource, name: str) -> Location:
    shape = weight_shapes(source.config)[name]
    locate = hf_location if source.kind == "safetensors" else mistral_location
    return locate(name, shape, source.config, ())
