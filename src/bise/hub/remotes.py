"""Models that other machines host: a list under BISE_HOME of where they are and which environment variable
holds their key. The key itself is never written anywhere.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bise.config import bise_home, secret_from, state_directory
from bise.errors import ConfigError, ModelFileError, UserError
from bise.hub.client import checked_url
from bise.hub.file_names import is_local_name
from bise.jsonfile import read_json_object

DIALECTS = ("openai", "mistral")
ENDPOINTS = ("chat", "embeddings", "completions", "fim")
DEFAULT_ENDPOINTS = ("chat", "embeddings")
MAX_REMOTES = 200
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSpec:
    """One hosted model. Raises ConfigError, naming the field."""

    name: str
    """What requests here call it."""
    url: str
    """Up to and with the version, such as https://HOST/v1."""
    model: str
    """What the host calls it."""
    key_env: str | None
    """The environment variable that holds the key; None for a host that needs none."""
    dialect: str = "openai"
    timeout_s: float = 120.0
    """Longest silence, and longest wait for a whole answer."""
    max_tokens: int = 4096
    """Most tokens of an answer when a request names no limit; never more than it asks for."""

    serves: tuple[str, ...] = DEFAULT_ENDPOINTS
    """What its host has; nothing else is sent there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "serves", tuple(self.serves))
        if not self.serves or not set(self.serves) <= set(ENDPOINTS):
            raise ConfigError(f"--serves must be some of {', '.join(ENDPOINTS)}", field="serves")
        if not is_local_name(self.name):
            raise ConfigError(f"'{self.name}' cannot be the name of a model", field="name")
        object.__setattr__(self, "url", checked_url(self.url, field="--url"))
        if not self.model.isprintable() or not 0 < len(self.model) <= 300:
            raise ConfigError("--model must have 1 to 300 printable characters", field="model")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ConfigError(
                "--key-env must be the name of an environment variable, not the key itself", field="key_env"
            )
        if self.dialect not in DIALECTS:
            raise ConfigError(f"--dialect must be one of {', '.join(DIALECTS)}", field="dialect")
        if not 0.05 <= self.timeout_s <= 3600:
            raise ConfigError(f"--timeout must be from 0.05 to 3600, got {self.timeout_s}", field="timeout_s")
        if not 1 <= self.max_tokens <= 1 << 24:
            raise ConfigError(f"--max-tokens must be at least 1, got {self.max_tokens}", field="max_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A hosted model with its key, ready to be asked."""

    spec: RemoteSpec
    key: str | None = field(repr=False)

    @classmethod
    def of(cls, spec: RemoteSpec) -> Remote:
        """Return the model with the key from the environment; ConfigError when it is not there."""
        return cls(spec=spec, key=None if spec.key_env is None else secret_from(spec.key_env))


def remotes_path() -> Path:
    """Return the file with the list."""
    return bise_home() / "remotes.json"


def load_remotes() -> dict[str, RemoteSpec]:
    """Return the hosted models by name. Raises ConfigError that names the file and the field."""
    path = remotes_path()
    if not path.exists():
        return {}
    try:
        table = read_json_object(path, max_bytes=1 << 20)
    except ModelFileError as error:
        raise ConfigError(str(error), field=str(path)) from error
    return {name: _spec(path, name, fields) for name, fields in table.items()}


def add_remote(spec: RemoteSpec) -> None:
    """Put a hosted model on the list. Raises UserError when the name is taken."""
    known = load_remotes()
    if spec.name in known:
        raise UserError(
            f"there is a hosted model '{spec.name}' already; `bise models rm {spec.name}` removes it"
        )
    if len(known) >= MAX_REMOTES:
        raise UserError(f"at most {MAX_REMOTES} hosted models can be listed")
    _save([*known.values(), spec])


def forget_remote(name: str) -> None:
    """Take a hosted model from the list."""
    _save([spec for spec in load_remotes().values() if spec.name != name])


def choose_remotes(names: tuple[str, ...]) -> list[Remote]:
    """Return the hosted models of these names with their keys. Raises UserError for an unknown one."""
    known = load_remotes()
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"'{name}' is no hosted model; listed: {listed} (`bise models add-remote`)")
    return [Remote.of(known[name]) for name in dict.fromkeys(names)]


def _spec(path: Path, name: str, fields: Any) -> RemoteSpec:
    try:
        return RemoteSpec(name=name, **fields)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {name} has a missing, unknown or bad field", field=name) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {name}: {error}", field=name) from error


def _save(specs: list[RemoteSpec]) -> None:
    table = {spec.name: {k: v for k, v in asdict(spec).items() if k != "name"} for spec in specs}
    path = state_directory() / remotes_path().name
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(table, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
