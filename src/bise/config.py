"""All configuration as frozen values: the architecture of a model and where state lives.

The only module that reads the environment (the native dispatcher reads BISE_ISA itself).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from bise.errors import ConfigError

ARCHITECTURE_LIMITS = {
    "dim": 1 << 17,
    "num_layers": 1024,
    "num_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 4096,
    "hidden_dim": 1 << 20,
    "vocab_size": 1 << 22,
    "max_context": 1 << 24,
    "num_experts": 1024,
}
"""Upper bounds per field: anything above is a damaged file, not a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: str
    """`linear`, `yarn`, `llama3` or `factors`."""
    factor: float
    """Context extension factor, >= 1."""
    original_context: int = 0
    """Trained context in tokens (yarn and llama3)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are fully stretched."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this are kept."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dimension is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is stretched."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; None means 0.1 ln(factor) + 1."""
    factors: tuple[float, ...] = ()
    """factors: divisor of each inverse frequency [D / 2], as a GGUF's rope_freqs tensor lists them."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "yarn", "llama3", "factors"):
            raise ConfigError(
                f"rope scaling '{self.kind}' is not supported; known: linear, yarn, llama3",
                field="rope_scaling",
            )
        positive = {
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": 1.0 if self.attention_factor is None else self.attention_factor,
        }
        for name, value in positive.items():
            if not 1e-6 <= value <= 1e6:
                raise ConfigError(
                    f"rope_scaling.{name} must be a number from 1e-6 to 1e6, got {value}",
                    field="rope_scaling",
                )
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor must be >= 1, got {self.factor}", field="rope_scaling")
        if (self.kind == "factors") != bool(self.factors) or not all(
            1e-6 <= value <= 1e6 for value in self.factors
        ):
            raise ConfigError("rope_scaling.factors must be numbers from 1e-6 to 1e6", field="rope_scaling")
        limit = ARCHITECTURE_LIMITS["max_context"]
        if self.kind in ("yarn", "llama3") and not 1 <= self.original_context <= limit:
            raise ConfigError(
                f"rope_scaling of kind {self.kind} needs original_max_position_embeddings from 1 to {limit}",
                field="rope_scaling",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture of one Mistral-family model (dense or mixture of experts)."""

    family: str
    """Name for people: `mistral`, `mixtral`, `ministral`, `llama`."""
    dim: int
    """Model width E."""
    num_layers: int
    num_heads: int
    """Query heads H."""
    num_kv_heads: int
    """Key/value heads G; divides num_heads."""
    head_dim: int
    """Width D of one head; never derived here (Nemo: head_dim != dim / num_heads)."""
    hidden_dim: int
    """Width F of the feed-forward layer (of one expert in a mixture)."""
    vocab_size: int
    max_context: int
    """Largest position + 1 that the model was made for, in tokens."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    windows: tuple[int | None, ...] = field(default=())
    """Sliding window per layer in tokens, None for full attention; `()` means full everywhere."""
    num_experts: int = 0
    """Experts X per layer; 0 for a dense model."""
    experts_per_token: int = 0
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})",
                field="num_kv_heads",
            )
        self._check_rope()
        if not (isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps must be a positive number, got {self.norm_eps}", field="norm_eps")
        if self.norm_eps >= 1:
            raise ConfigError(f"norm_eps must be below 1, got {self.norm_eps}", field="norm_eps")
        if bool(self.num_experts) != bool(self.experts_per_token):
            raise ConfigError("num_experts and experts_per_token must be given together", field="num_experts")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})",
                field="experts_per_token",
            )
        windows = self.windows or (None,) * self.num_layers
        if len(windows) != self.num_layers:
            raise ConfigError(f"{len(windows)} windows given for {self.num_layers} layers", field="windows")
        for window in windows:
            if window is not None and window < 1:
                raise ConfigError(f"a sliding window must be >= 1 token, got {window}", field="windows")
        object.__setattr__(self, "windows", windows)

    def _check_sizes(self) -> None:
        for name, limit in ARCHITECTURE_LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, got {value!r}", field=name)
            low = 0 if name == "num_experts" else 1
            if not low <= value <= limit:
                raise ConfigError(f"{name} must be between {low} and {limit}, got {value}", field=name)

    def _check_rope(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even for rotary embedding, got {self.head_dim}", field="head_dim"
            )
        if not (isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ConfigError(
                f"rope_theta must be a positive number, got {self.rope_theta}", field="rope_theta"
            )
        if not 1 < self.rope_theta <= 1e15:
            raise ConfigError(
                f"rope_theta must be above 1 and at most 1e15, got {self.rope_theta}", field="rope_theta"
            )
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            raise ConfigError(
                f"rope_scaling.factors has {len(factors)} values, not head_dim / 2 = {self.head_dim // 2}",
                field="rope_scaling",
            )

    def check_context(self, context: int) -> None:
        """Raise ConfigError for a context, in tokens, that this model cannot have."""
        if not 1 <= context <= self.max_context:
            raise ConfigError(
                f"context must be from 1 to {self.max_context} tokens (this model's), got {context}",
                field="context",
            )

    @property
    def is_moe(self) -> bool:
        """True for a mixture of experts."""
        return self.num_experts > 0

    @property
    def q_dim(self) -> int:
        """Rows of the query projection, H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Rows of the key (or value) projection, G * D."""
        return self.num_kv_heads * self.head_dim

    @property
    def window_groups(self) -> tuple[int | None, ...]:
        """Distinct windows in order of first use; layers of one group share a block table."""
        return tuple(dict.fromkeys(self.windows))

    @property
    def num_params(self) -> int:
        """Parameters in all."""
        return self._num_params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters used for one token."""
        return self._num_params(self.experts_per_token)

    def _num_params(self, experts: int) -> int:
        attention = self.dim * (2 * self.q_dim + 2 * self.kv_dim)
        ffn = 3 * self.dim * self.hidden_dim * (experts if self.is_moe else 1) + self.dim * self.num_experts
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + ffn + 2 * self.dim) + self.dim + embeddings

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """KV cache bytes that one token adds over all layers (before any window frees it)."""
        return 2 * self.kv_dim * self.num_layers * bytes_per_value

    def kv_bytes(self, context: int, bytes_per_value: float = 2.0) -> float:
        """KV cache bytes of one sequence of `context` tokens, windows taken into account."""
        per_layer = 2 * self.kv_dim * bytes_per_value
        return sum(per_layer * min(context, window or context) for window in self.windows)


def user_path(path: str | Path) -> Path:
    """Return a path as a person writes it, `~` and `~NAME` replaced. Raises ConfigError where nobody has that
    home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: the system knows no such home directory; write the whole path, or set HOME",
            field="path",
        ) from error


def bise_home() -> Path:
    """Directory of all state: `BISE_HOME`, else the platform's data directory for `bise`."""
    if path := os.environ.get("BISE_HOME"):
        return user_path(path)
    if sys.platform == "darwin":
        return user_path("~/Library/Application Support/bise")
    if sys.platform == "win32":
        return user_path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")) / "bise"
    return user_path(os.environ.get("XDG_DATA_HOME", "~/.local/share")) / "bise"


def state_directory(*parts: str) -> Path:
    """Make and return a directory under BISE_HOME; every level that is made is the user's alone (0700).

    Raises OSError.
    """
    path = bise_home()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        for part in parts:
            path = path / part
            path.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        reason = f"{error.strerror}; BISE_HOME must be a directory that you may write to"
        raise OSError(error.errno, reason, error.filename) from error
    return path


def secret_from(variable: str) -> str:
    """Return what the environment variable holds, for keys and tokens; ConfigError when it is unset or empty
    or no key could look like that. The value appears in no message.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"the environment variable {variable} is not set; it must hold the key", field=variable
        )
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ConfigError(
            f"the environment variable {variable} holds characters that no key has", field=variable
        )
    return value


def colour_wanted() -> bool:
    """Return False when `NO_COLOR` is set to anything (no-color.org) or the terminal is a dumb one."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def debug_enabled() -> bool:
    """Return True when `BISE_DEBUG=1` asks for tracebacks."""
    return os.environ.get("BISE_DEBUG") == "1"


def default_threads() -> int:
    """Worker threads of the CPU backend: `BISE_THREADS`, else the processors this process may use."""
    if text := os.environ.get("BISE_THREADS"):
        if not text.isdecimal() or not 1 <= int(text) <= 1024:
            raise ConfigError(
                f"BISE_THREADS must be a whole number from 1 to 1024, got '{text}'", field="BISE_THREADS"
            )
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
