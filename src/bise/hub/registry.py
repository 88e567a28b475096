"""Models known by name, and the way from what a user typed to a path on this machine.

Sizes are not typed in: they follow from each model's architecture. Nothing here touches the network.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from bise.config import ModelConfig, bise_home, user_path
from bise.errors import ModelFileError, UserError
from bise.hub.embedded import NAME as EMBEDDED
from bise.hub.embedded import embedded_path
from bise.jsonfile import read_json_object

Q4_BITS = 4.5
"""Bits per weight of a 4-bit format with one 16-bit scale per 32 weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """One published model: what it is called, where it comes from, what it costs to hold."""

    alias: str
    repo: str
    """`owner/name` of the publisher's repository."""
    licence: str
    config: ModelConfig
    chat: bool = True
    """Tuned for conversation; otherwise a base model for `bise generate`."""

    @property
    def bf16_bytes(self) -> int:
        """Bytes of the weights at 16 bits."""
        return 2 * self.config.num_params

    @property
    def q4_bytes(self) -> int:
        """Bytes of the weights at 4.5 bits each."""
        return int(self.config.num_params * Q4_BITS / 8)


def _mistral_7b(*, vocab: int = 32768, context: int = 32768, window: int | None = None) -> ModelConfig:
    return ModelConfig(
        family="mistral", dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        hidden_dim=14336, vocab_size=vocab, max_context=context, windows=(window,) * 32,
        rope_theta=1e4 if window else 1e6,
    )  # fmt: skip


def _dense(family: str, dim: int, layers: int, heads: int, kv: int, hidden: int, vocab: int, context: int,
           head_dim: int = 128) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        family=family, dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=kv, head_dim=head_dim,
        hidden_dim=hidden, vocab_size=vocab, max_context=context,
    )  # fmt: skip


def _mixtral(dim: int, layers: int, heads: int, hidden: int, vocab: int, context: int) -> ModelConfig:
    return ModelConfig(
        family="mixtral", dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden, vocab_size=vocab, max_context=context, num_experts=8, experts_per_token=2,
        rope_theta=1e6,
    )  # fmt: skip


def known_models() -> tuple[KnownModel, ...]:
    """Return the models that have an alias, smallest family first."""
    apache, llama2, llama3 = "Apache-2.0", "Llama 2", "Llama 3.1"
    research = "Mistral Research"
    windowed = _mistral_7b(vocab=32000, context=32768, window=4096)
    tiny = _dense("llama", 2048, 22, 32, 4, 5632, 32000, 2048, head_dim=64)
    rows = [
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", apache, tiny, True),
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", apache, _mistral_7b(), True),
        ("mistral-7b-v0.3-base", "mistralai/Mistral-7B-v0.3", apache, _mistral_7b(), False),
        ("mistral-7b-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", apache, _mistral_7b(vocab=32000), True),
        ("mistral-7b-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", apache, windowed, True),
        ("mistral-7b-v0.1-base", "mistralai/Mistral-7B-v0.1", apache, windowed, False),
        ("ministral-8b", "mistralai/Ministral-8B-Instruct-2410", research,
         _dense("ministral", 4096, 36, 32, 8, 12288, 131072, 32768), True),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Instruct-2407", apache,
         _dense("mistral", 5120, 40, 32, 8, 14336, 131072, 131072), True),
        ("mistral-small", "mistralai/Mistral-Small-24B-Instruct-2501", apache,
         _dense("mistral", 5120, 40, 32, 8, 32768, 131072, 32768), True),
        ("mistral-large", "mistralai/Mistral-Large-Instruct-2407", research,
         _dense("mistral", 12288, 88, 96, 8, 28672, 32768, 131072), True),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", apache,
         _mixtral(4096, 32, 32, 14336, 32000, 32768), True),
        ("mixtral-8x22b", "mistralai/Mixtral-8x22B-Instruct-v0.1", apache,
         _mixtral(6144, 56, 48, 16384, 32768, 65536), True),
        ("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf", llama2,
         _dense("llama", 4096, 32, 32, 32, 11008, 32000, 4096), True),
        ("llama-2-13b", "meta-llama/Llama-2-13b-chat-hf", llama2,
         _dense("llama", 5120, 40, 40, 40, 13824, 32000, 4096), True),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", llama3,
         _dense("llama", 4096, 32, 32, 8, 14336, 128256, 131072), True),
    ]  # fmt: skip
    return tuple(
        KnownModel(alias=alias, repo=repo, licence=licence, config=config, chat=chat)
        for alias, repo, licence, config, chat in rows
    )


def models_dir() -> Path:
    """Return the directory under BISE_HOME where models lie by name, one folder or .gguf each."""
    return bise_home() / "models"


def local_models() -> list[Path]:
    """Return what lies in `models_dir()`, sorted by name; [] when there is nothing."""
    folder = models_dir()
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix == ".gguf")
    )


def resolve(name: str | None) -> Path:
    """Return the path that a MODEL argument means: a path, a name under `models_dir()`; None: embedded.

    Raises UserError with the way out when there is no such thing on this machine.
    """
    if name is None or name == EMBEDDED:
        return embedded_path()
    if not name:
        raise UserError("MODEL is empty; leave it out for the embedded model")
    path = user_path(name)
    if _exists(path):
        return path
    if "/" not in name and "\\" not in name:
        for candidate in (models_dir() / name, models_dir() / f"{name}.gguf"):
            if _exists(candidate):
                return candidate
    for folder in local_models():
        if origin_of(folder).get("repo") == name:
            return folder
    return _refuse(name)


def origin_of(folder: Path) -> dict[str, str]:
    """Return where a pulled model comes from: `hub`, `repo`, `commit`, `licence`; {} for any other."""
    try:
        fields = read_json_object(folder / "pulled.json", max_bytes=1 << 16)
    except ModelFileError:
        return {}
    return {key: value for key, value in fields.items() if isinstance(value, str)}


def local_name(repo: str) -> str:
    """Return what a repository's model is called on this machine: its alias, else its name without owner."""
    aliases = {model.repo: model.alias for model in known_models()}
    return aliases.get(repo, repo.rpartition("/")[2])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL byte
        raise UserError(f"{path}: cannot be looked up ({error.__class__.__name__})") from error


def _refuse(name: str) -> Path:
    known = {model.alias: model for model in known_models()}
    known |= {model.repo: model for model in known.values()}
    if model := known.get(name):
        raise UserError(
            f"{model.alias} is not on this machine: `bise models pull {model.alias}` fetches {model.repo} "
            f"({gigabytes(model.bf16_bytes)} at 16 bits, licence {model.licence}); or name its directory "
            f"or .gguf file, or put it at {models_dir() / model.alias}"
        )
    if "/" in name or name.endswith((".gguf", ".safetensors", ".json")):
        raise UserError(f"{name}: no such file or directory")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"'{name}' is not a file, a directory or a known alias; {hint}`bise models` lists the aliases"
    )


def gigabytes(size_bytes: float) -> str:
    """Return a size for people: `14.5 GB` (10^9 bytes), `812 MB`, `3.2 kB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{size_bytes:.0f} B"
