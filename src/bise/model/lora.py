"""LoRA adapters on disk: PEFT's layout, checked as strictly as a model, and their weights on a backend.

A directory with `adapter_config.json` and `adapter_model.safetensors`. Our own adapters have the same layout
and carry the content hash of their base model in the file's metadata under `BASE_HASH`. What cannot be
honoured (DoRA, biases, saved modules, adapted experts ...) is refused by name; nothing is skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig
from bise.diskfile import open_regular, require_inside
from bise.errors import ModelFileError, quoted
from bise.jsonfile import parse_json, read_bytes
from bise.kernels import Lora, Ops
from bise.model.safetensors_file import FLOAT_BYTES, SafetensorsFile, StoredTensor, TensorEntry
from bise.model.transformer import weight_shapes

T = TypeVar("T", int, float)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_HASH = "bise.base_sha256"
"""Metadata key: content hash of the base model's weight files (`packed.content_hash`)."""

MAX_RANK = 4096
_CONFIG_BYTES = 4 << 20

MODULES = {
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w1",
    "mlp.up_proj": "w3",
    "mlp.down_proj": "w2",
}
"""Hugging Face's name of each matrix that can be adapted, to bise's."""
_ATTENTION = ("wq", "wk", "wv", "wo")

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]{0,3})\."
    r"(?P<part>[a-z_]{1,20}\.[a-z_]{1,20}))\.lora_(?P<half>[AB])\.weight"
)

_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "init_lora_weights",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type",
    "peft_version", "exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
"""Fields that say how an adapter was made or where it belongs, not what it computes. A field that is neither
here nor in `_READ` must be off."""

_PLAIN_INITS = ("gaussian", "orthogonal", "eva")
"""Ways to draw the first A and B that leave the base model alone; the others (pissa, olora, loftq ...) move a
part of its weights into the adapter."""

_LITERAL_PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapted weight on disk: scale * B A is added to it."""

    a: StoredTensor
    """[r, K]"""
    b: StoredTensor
    """[N, r]"""
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter as it lies on disk, its header checked against a base model; values are not read yet."""

    path: Path
    sha256: str
    """Of configuration and weights: tells this adapter from any other."""
    base_sha256: str | None
    """Content hash of the base model it was trained on; None when the file states none."""
    base_name: str | None
    """What the file calls its base model."""
    parts: Mapping[str, LowRank]
    """By the name of the weight, such as `layers.0.wq`."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the matrices in memory at most: float32, rows padded to 16."""
        return 4 * sum(
            _padded(part.a.shape[0]) * part.a.shape[1] + _padded(part.b.shape[0]) * part.b.shape[1]
            for part in self.parts.values()
        )

    @property
    def rank(self) -> int:
        """Largest rank of its matrices."""
        return max(part.a.shape[0] for part in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """An adapter on a backend, ready to be used by rows of a batch."""

    path: Path
    sha256: str
    """Identifies its values; keys and values computed with it belong to no other."""
    rank: int
    size_bytes: int
    loras: Mapping[str, Lora]
    """By the name of the weight, such as `layers.0.wq`."""


def open_adapter(path: Path, config: ModelConfig) -> AdapterFile:
    """Open the adapter in directory `path` and check it against the base model's architecture.

    Raises ModelFileError that names the file and the field or tensor: for anything that is not a LoRA adapter
    of this model, in every detail.
    """
    _require_files(path)
    config_path, weights_path = path / CONFIG_FILE, path / WEIGHTS_FILE
    text = read_bytes(config_path, max_bytes=_CONFIG_BYTES)
    settings = _Settings(config_path, parse_json(text, str(config_path)))
    file = SafetensorsFile(weights_path)
    parts = _pair(file, settings, config)
    settings.check_complete(parts, config)
    return AdapterFile(
        path=path,
        sha256=_content_hash(text, weights_path),
        base_sha256=_base_hash(file),
        base_name=settings.base_name,
        parts=parts,
    )


def load_adapter(file: AdapterFile, ops: Ops) -> Adapter:
    """Read the values and put them on a backend. Raises ModelFileError for a value that is not finite."""
    loras = {
        name: ops.layer(int(name.split(".")[1])).lora(
            _values(file, name, part.a), _values(file, name, part.b), part.scale
        )
        for name, part in file.parts.items()
    }
    return Adapter(
        path=file.path, sha256=file.sha256, rank=file.rank, size_bytes=file.size_bytes, loras=loras
    )


def check_base(file: AdapterFile, content_hash: Callable[[], str]) -> None:
    """Raise ModelFileError when the adapter names the hash of another base model; without one there is
    nothing to compare, and `content_hash` is not called.
    """
    if file.base_sha256 is None:
        return
    found = content_hash()
    if found != file.base_sha256:
        raise ModelFileError(
            f"{file.path} was trained on a base model whose files hash to {file.base_sha256[:12]}..., this "
            f"one's hash to {found[:12]}...; load it beside the model it was trained on",
            field=BASE_HASH,
        )


class _Settings:
    """The fields of adapter_config.json that decide what an adapter computes, checked."""

    def __init__(self, path: Path, value: object) -> None:
        if not isinstance(value, dict):
            raise ModelFileError(f"{path}: must hold a JSON object", field=str(path))
        self._path = path
        self._fields = fields = cast(dict[str, object], value)
        if fields.get("peft_type") != "LORA":
            self._refuse("peft_type", "must be LORA, the only kind of adapter that bise runs")
        for name, setting in fields.items():
            if name not in _READ | _HARMLESS and setting not in (None, False, "", [], {}):
                self._refuse(name, "is not supported: bise runs plain LoRA only")
        if fields.get("bias", "none") != "none":
            self._refuse("bias", "must be none: bise adds no biases to a model that has none")
        init = fields.get("init_lora_weights", True)
        if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
            self._refuse(
                "init_lora_weights",
                "moves weights of the base model into the adapter; save it again with PEFT's "
                "path_initial_model_for_weight_conversion",
            )
        self._r = self._rank("r", fields.get("r", 8))
        self._alpha = self._number("lora_alpha", fields.get("lora_alpha", 8))
        self._uses_root = self._flag("use_rslora")
        self._ranks = {key: self._rank("rank_pattern", r) for key, r in self._pattern("rank_pattern")}
        self._alphas = {key: self._number("alpha_pattern", v) for key, v in self._pattern("alpha_pattern")}
        name = fields.get("base_model_name_or_path")
        self.base_name = name if isinstance(name, str) and name else None

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module such as model.layers.0.self_attn.q_proj."""
        return _first_match(self._ranks, module, self._r)

    def scale(self, module: str) -> float:
        """Return what B A is multiplied with."""
        rank = self.rank(module)
        return _first_match(self._alphas, module, self._alpha) / (sqrt(rank) if self._uses_root else rank)

    def check_complete(self, parts: Mapping[str, LowRank], config: ModelConfig) -> None:
        """Raise unless every module that the configuration lists by name is there in every layer."""
        targets = self._fields.get("target_modules")
        narrowed = any(self._fields.get(name) for name in ("layers_to_transform", "exclude_modules"))
        if not isinstance(targets, list) or narrowed:
            return
        for target in cast(list[object], targets):
            for module, weight in MODULES.items():
                if target not in (module, module.partition(".")[2]):
                    continue
                for layer in range(config.num_layers):
                    if f"layers.{layer}.{weight}" not in parts:
                        self._refuse(
                            "target_modules", f"lists {target}, but layer {layer} has no such tensors"
                        )

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise ModelFileError(
            f"{self._path}: {name} {reason}; it is {quoted(self._fields.get(name))}", field=name
        )

    def _rank(self, name: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            self._refuse(name, f"must give whole numbers from 1 to {MAX_RANK}")
        return value

    def _number(self, name: str, value: object) -> float:
        if (
            type(value) not in (int, float)
            or not isfinite(cast(float, value))
            or abs(cast(float, value)) > 1e6
        ):
            self._refuse(name, "must give finite numbers of at most 1e6")
        return float(cast(float, value))

    def _flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            self._refuse(name, "must be true or false")
        return value

    def _pattern(self, name: str) -> list[tuple[str, object]]:
        value = self._fields.get(name)
        if value is None:
            return []
        if not isinstance(value, dict):
            self._refuse(name, "must map module names to numbers")
        patterns = cast(dict[str, object], value)
        for key in patterns:
            # A pattern is a regular expression in PEFT; one from a stranger's file is never run.
            if not _LITERAL_PATTERN.fullmatch(key):
                self._refuse(name, f"has the pattern {quoted(key)}; bise takes plain module names only")
        return list(patterns.items())


def _first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first pattern that names the end of `module` (all of it after a ^)."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if module == name or (name == pattern and module.endswith("." + name)):
            return value
    return default


def _require_files(path: Path) -> None:
    if not (path.is_dir() and os.path.lexists(path / CONFIG_FILE)):
        raise ModelFileError(f"{path}: an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (path / WEIGHTS_FILE).exists() and (path / "adapter_model.bin").exists():
        raise ModelFileError(
            f"{path}/adapter_model.bin is a Python pickle, which can run code when it is read; save the "
            "adapter as safetensors",
            field="adapter_model.bin",
        )
    require_inside(path, (CONFIG_FILE, WEIGHTS_FILE))


def _pair(file: SafetensorsFile, settings: _Settings, config: ModelConfig) -> dict[str, LowRank]:
    """Return the pairs of A and B by weight name; raises for a tensor that is no part of one."""
    shapes = weight_shapes(config)
    halves: dict[tuple[str, str], TensorEntry] = {}
    modules: dict[str, str] = {}
    for name, entry in file.entries.items():
        weight, module, half = _place(file, name, shapes, config)
        if (weight, half) in halves:
            _refuse(file, name, "is there twice, with and without `model.`")
        halves[weight, half] = entry
        modules[weight] = module
    if not halves:
        raise ModelFileError(f"{file.path} holds no tensors", field=str(file.path))
    parts: dict[str, LowRank] = {}
    for weight, module in modules.items():
        rows, columns = shapes[weight]
        rank = settings.rank(module)
        found: dict[str, StoredTensor] = {}
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            entry = halves.get((weight, half))
            if entry is None:
                raise ModelFileError(f"{file.path}: {module} has no lora_{half}", field=module)
            if entry.shape != shape:
                _refuse(file, entry.name, f"has the shape {list(entry.shape)}, expected {list(shape)}")
            if entry.dtype not in FLOAT_BYTES:
                _refuse(file, entry.name, f"is stored as {entry.dtype}; supported: {', '.join(FLOAT_BYTES)}")
            found[half] = StoredTensor(file, entry, shape)
        parts[weight] = LowRank(found["A"], found["B"], settings.scale(module))
    return parts


def _place(
    file: SafetensorsFile, name: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> tuple[str, str, str]:
    """Return (weight name, module name, A or B) of a stored tensor."""
    match = _TENSOR.fullmatch(name)
    weight = MODULES.get(match["part"]) if match else None
    if match is None or weight is None or (config.is_moe and weight not in _ATTENTION):
        known = list(MODULES)[:4] if config.is_moe else list(MODULES)
        kind = "a mixture of experts is adapted in its attention alone" if config.is_moe else "no such part"
        _refuse(file, name, f"cannot be used ({kind}); supported: lora_A and lora_B of {', '.join(known)}")
    full = f"layers.{match['layer']}.{weight}"
    if full not in shapes:
        _refuse(file, name, f"is of a layer that the model does not have (it has {config.num_layers})")
    return full, match["module"], match["half"]


def _refuse(file: SafetensorsFile, name: str, reason: str) -> NoReturn:
    raise ModelFileError(f"{file.path}: tensor {quoted(name, 120)} {reason}", field=name)


def _base_hash(file: SafetensorsFile) -> str | None:
    value = file.metadata.get(BASE_HASH)
    if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ModelFileError(
            f"{file.path}: {BASE_HASH} must be a SHA-256 in hexadecimal, got {quoted(value)}", field=BASE_HASH
        )
    return value


def _content_hash(config: bytes, weights: Path) -> str:
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    descriptor, _ = open_regular(weights)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 a descriptor, opened and checked above
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _values(file: AdapterFile, weight: str, tensor: StoredTensor) -> npt.NDArray[np.float32]:
    values = tensor.floats(0, tensor.shape[0])
    if not np.isfinite(values).all():
        raise ModelFileError(
            f"{file.path / WEIGHTS_FILE}: what it adds to {weight} has a value that is NaN or infinite",
            field=weight,
        )
    return values


def _padded(rows: int) -> int:
    return -(-rows // 16) * 16
