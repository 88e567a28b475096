"""Opening a model on disk as a `ModelSource`: Hugging Face and Mistral directories, and .gguf files.

Only headers are read here; every tensor is checked against the configuration before any weight is. PyTorch
pickles are refused: reading one runs whatever code its author put in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from bise.config import ModelConfig
from bise.diskfile import resolve_inside
from bise.errors import ModelFileError, quoted
from bise.jsonfile import read_json_object
from bise.model.hf_config import read_hf_config
from bise.model.licence import licence_of, model_name
from bise.model.mistral_params import read_mistral_params
from bise.model.safetensors_file import FLOAT_BYTES, SafetensorsFile, StoredTensor, TensorEntry
from bise.model.source import ModelSource
from bise.model.tensor_names import Location, hf_location, is_ignored, mistral_location
from bise.model.transformer import weight_shapes

_CONFIG_BYTES = 4 << 20
_INDEX_BYTES = 64 << 20
_MAX_NAMES = 20_000
_MAX_SHARDS = 512
_MAX_EXPERTS = 1 << 17
"""Experts over all layers; eight times the largest mixture that was published."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
"""Parts 2 to N of a split GGUF; the first one leads to them."""

_Locate = Callable[[str, tuple[int, ...], ModelConfig, Collection[str]], Location]


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way of laying out a model directory."""

    kind: str
    config_file: str
    index_file: str
    prefix: str
    """What the weight files' names start with ("" when any other safetensors file will do)."""
    read_config: Callable[[Mapping[str, object], str], ModelConfig]
    locate: _Locate


_HF = _Layout("safetensors", "config.json", "model.safetensors.index.json", "", read_hf_config, hf_location)
_MISTRAL = _Layout(
    "mistral",
    "params.json",
    "consolidated.safetensors.index.json",
    "consolidated",
    read_mistral_params,
    mistral_location,
)


def open_model(path: Path) -> ModelSource:
    """Return the model at `path`: a directory (Hugging Face layout, Mistral's, or one .gguf file) or a .gguf.

    A directory with both layouts is opened as Hugging Face (`kind` says which it was). Raises
    `ModelFileError`, one line that names file and field, for anything missing, malformed, unsupported or
    contradictory.
    """
    path = Path(path)
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{quoted(str(path), 400)} cannot be read: {error}", field=str(path)) from error
    if not is_directory:
        return _open_file(path)
    names = _entries(path)
    if "packed.safetensors" in names:
        # Imported here: packing needs the native extension, inspecting other models does not.
        from bise.model.packed import open_packed

        return open_packed(path)
    if layout := _layout(names):
        return _open_directory(path, names, layout)
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if len(starts := [name for name in ggufs if not _LATER_PART.search(name)]) == 1:
        return _open_gguf(_inside(path, starts[0]))
    raise _no_model(path, names, ggufs)


def _open_file(path: Path) -> ModelSource:
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if path.suffix.lower() in _PICKLES:
        raise _pickle(path, path.name)
    if not path.exists() and not path.is_symlink():
        raise ModelFileError(f"{quoted(str(path), 400)} does not exist", field=str(path))
    raise ModelFileError(
        f"{quoted(str(path), 400)} is neither a directory nor a .gguf file; give the model's directory",
        field=str(path),
    )


def _open_gguf(path: Path) -> ModelSource:
    # Imported here: only this source needs it, and start-up must stay short.
    from bise.model.gguf import open_gguf

    return open_gguf(path)


def _entries(directory: Path) -> frozenset[str]:
    names: set[str] = set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                names.add(entry.name)
                if len(names) > _MAX_NAMES:
                    raise ModelFileError(
                        f"{directory} has more than {_MAX_NAMES} entries; give a model's directory"
                    )
    except OSError as error:
        raise ModelFileError(f"{directory} cannot be read: {error.strerror}", field=str(directory)) from error
    return frozenset(names)


def _weight_names(names: Iterable[str], layout: _Layout) -> list[str]:
    """Return the safetensors files of a layout, sorted; adapters are not models."""
    return sorted(
        name
        for name in names
        if name.endswith(".safetensors")
        and name.startswith("consolidated") == bool(layout.prefix)
        and not name.startswith("adapter_")
    )


def _layout(names: frozenset[str]) -> _Layout | None:
    for layout in (_HF, _MISTRAL):
        if layout.config_file in names and (layout.index_file in names or _weight_names(names, layout)):
            return layout
    return None


def _no_model(path: Path, names: frozenset[str], ggufs: list[str]) -> ModelFileError:
    """Return the error for a directory without a model that can be opened, with the likeliest way out."""
    pickles = sorted(name for name in names if name.lower().endswith(_PICKLES))
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    configs = [layout.config_file for layout in (_HF, _MISTRAL) if layout.config_file in names]
    if len(ggufs) > 1:
        return ModelFileError(f"{path} has {len(ggufs)} .gguf files; give the path of one of them")
    if pickles:
        return _pickle(path, pickles[0])
    if "adapter_config.json" in names:
        return ModelFileError(f"{path} holds an adapter, not a model; give the base model's directory")
    if weights:
        wanted = "params.json" if weights[0].startswith("consolidated") else "config.json"
        return ModelFileError(f"{path} has {quoted(weights[0])} but no {wanted}; fetch it too", field=wanted)
    if "snapshots" in names:
        return ModelFileError(
            f"{path} is a hub cache; give one of its snapshots: {path / 'snapshots' / 'REVISION'}"
        )
    if configs:
        return ModelFileError(f"{path} has {configs[0]} but no *.safetensors weights; fetch them too")
    return ModelFileError(
        f"{path} holds no model: neither config.json + *.safetensors, nor params.json + "
        "consolidated*.safetensors, nor a .gguf file",
        field=str(path),
    )


def _pickle(path: Path, name: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: {quoted(name)} is a PyTorch pickle, which can run any code when it is read; "
        "use the model's safetensors or GGUF files",
        field=name,
    )


def _open_directory(directory: Path, names: frozenset[str], layout: _Layout) -> ModelSource:
    config_path = _inside(directory, layout.config_file)
    origin = str(config_path)
    values = read_json_object(config_path, max_bytes=_CONFIG_BYTES)
    config = layout.read_config(values, origin)
    files = _open_shards(directory, names, layout)
    stored = {name: (file, entry) for file in files for name, entry in file.entries.items()}
    config, tensors = _match(config, origin, stored, layout.locate)
    return ModelSource(
        path=directory,
        kind=layout.kind,
        config=config,
        tensors=tensors,
        metadata=values,
        name=model_name(directory),
        licence=licence_of(directory, names),
    )


def _open_shards(directory: Path, names: frozenset[str], layout: _Layout) -> list[SafetensorsFile]:
    """Open every weight file and check that each tensor is in exactly the file that the index names."""
    found = _weight_names(names, layout)
    single = f"{layout.prefix or 'model'}.safetensors"
    if layout.index_file not in names:
        if len(found) > 1 and single not in found:
            raise ModelFileError(
                f"{directory} has {len(found)} weight files but no {layout.index_file}; fetch it too",
                field=layout.index_file,
            )
        return [_open_shard(directory, single if single in found else found[0])]
    if single in names:
        raise ModelFileError(
            f"{directory} has both {single} and {layout.index_file}; remove the one that is left over",
            field=single,
        )
    weight_map = _weight_map(directory, layout.index_file)
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise ModelFileError(
            f"{directory / layout.index_file}: weight_map names {len(shards)} files, too many"
        )
    files = [_open_shard(directory, shard) for shard in shards]
    for shard, file in zip(shards, files, strict=True):
        for name in file.entries:
            if weight_map.get(name) != shard:
                raise ModelFileError(
                    f"{file.path}: tensor {quoted(name)} is here, but {layout.index_file} "
                    f"{'says ' + quoted(weight_map[name]) if name in weight_map else 'does not list it'}",
                    field=name,
                )
    present = {name for file in files for name in file.entries}
    for name, shard in weight_map.items():
        if name not in present:
            raise ModelFileError(
                f"{directory / shard}: tensor {quoted(name)} is missing, but {layout.index_file} lists it",
                field=name,
            )
    return files


def _open_shard(directory: Path, name: str) -> SafetensorsFile:
    return SafetensorsFile(_inside(directory, name))


def _inside(directory: Path, name: str) -> Path:
    """Return the path of a file that was found to lie inside the directory, under the name a person knows."""
    resolve_inside(directory, name)
    return directory / name


def _weight_map(directory: Path, index_file: str) -> dict[str, str]:
    origin = _inside(directory, index_file)
    index = read_json_object(origin, max_bytes=_INDEX_BYTES)
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ModelFileError(
            f"{origin}: metadata must be an object, got {quoted(metadata)}", field="metadata"
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{origin}: weight_map must be an object and not empty", field="weight_map")
    result: dict[str, str] = {}
    for name, shard in cast(dict[str, object], weight_map).items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelFileError(
                f"{origin}: weight_map[{quoted(name)}] must name a .safetensors file, got {quoted(shard)}",
                field="weight_map",
            )
        result[name] = shard
    return result


def _match(
    config: ModelConfig,
    origin: str,
    stored: dict[str, tuple[SafetensorsFile, TensorEntry]],
    locate: _Locate,
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Return the configuration and every weight by bise's names; stored tensors must match it one to one."""
    _check_count(config, origin, stored)
    if config.tied_embeddings and locate("output", (), config, stored).stored_name in stored:
        # Stored beside the embeddings: what is stored is used, so that nothing on disk is ignored.
        config = replace(config, tied_embeddings=False)
    tensors: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for name, shape in weight_shapes(config).items():
        location = locate(name, shape, config, stored)
        if location.stored_name not in stored:
            raise ModelFileError(f"{origin}: tensor {quoted(location.stored_name)} is missing", field=name)
        file, entry = stored[location.stored_name]
        _check_entry(file, entry, location.stored_shape, origin)
        used.add(location.stored_name)
        tensors[name] = StoredTensor(
            file, entry, shape, first_row=location.first_row, pair_width=location.pair_width
        )
    for name in stored.keys() - used:
        if not is_ignored(name, config):
            raise ModelFileError(
                f"{stored[name][0].path}: tensor {quoted(name)} does not belong to the model of {origin}",
                field=name,
            )
    return config, tensors


def _check_count(config: ModelConfig, origin: str, stored: Collection[str]) -> None:
    """Refuse a configuration that needs far more tensors than there are, before their names are made."""
    per_layer = 9
    if config.is_moe and not any(name.endswith(".experts.gate_up_proj") for name in stored):
        per_layer = 7 + 3 * config.num_experts
    if config.num_layers * per_layer > len(stored) or config.num_layers * config.num_experts > _MAX_EXPERTS:
        raise ModelFileError(
            f"{origin}: {config.num_layers} layers need at least {config.num_layers * per_layer} tensors, "
            f"the files hold {len(stored)}: layers are missing",
            field="num_hidden_layers",
        )


def _check_entry(file: SafetensorsFile, entry: TensorEntry, shape: tuple[int, ...], origin: str) -> None:
    where = f"{file.path}: tensor {quoted(entry.name)}"
    if entry.dtype not in FLOAT_BYTES:
        raise ModelFileError(
            f"{where} is stored as {entry.dtype}, which bise does not read as a weight; "
            "use a checkpoint in F32, F16 or BF16, or a GGUF file",
            field=entry.name,
        )
    if entry.shape != shape:
        raise ModelFileError(
            f"{where} has shape {quoted(list(entry.shape))}, {origin} makes it {list(shape)}",
            field=entry.name,
        )
