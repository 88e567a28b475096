"""Other engines as contestants: found when installed, told as absent when not, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from bise.bench.gguf_file import GGUF_KINDS, gguf_formats, gguf_path
from bise.bench.rounds import Case, PeerError, process_cpu_seconds
from bise.config import ModelConfig
from bise.engine.memory import packed_formats
from bise.errors import ConfigError
from bise.model.source import ModelSource

PEERS = ("llama.cpp", "transformers", "ctranslate2")

_PACKAGES = {
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "transformers": ("transformers", "transformers"),
    "ctranslate2": ("ctranslate2", "ctranslate2"),
}
_WORKERS = {
    "llama.cpp": "bise.bench.llama_worker",
    "transformers": "bise.bench.transformers_worker",
    "ctranslate2": "bise.bench.ctranslate2_worker",
}
_GGUF_OF_QUANT = {"q4": "Q4_0", "q8": "Q8_0", "bf16": "BF16", "none": "BF16", "auto": "Q8_0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """A peer as asked for: `llama.cpp`, or `llama.cpp:Q4_K_M`."""

    engine: str
    kind: str | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        return self.engine if self.kind is None else f"{self.engine} {self.kind}"


def parse_peers(text: str) -> tuple[PeerSpec, ...]:
    """Return the peers of a comma-separated list. Raises ConfigError for one that nobody knows."""
    found: list[PeerSpec] = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        engine, _, kind = part.partition(":")
        if engine not in PEERS:
            raise ConfigError(f"'{engine}' is not a known peer; known: {', '.join(PEERS)}", field="vs")
        if kind and (engine != "llama.cpp" or kind not in GGUF_KINDS):
            raise ConfigError(f"'{part}': llama.cpp takes {', '.join(GGUF_KINDS)}", field="vs")
        found.append(PeerSpec(engine=engine, kind=kind or None))
    return tuple(found)


class PeerContestant:
    """A peer behind a pipe."""

    def __init__(
        self, name: str, worker: str, options: Mapping[str, Any], formats: Mapping[str, str], kv_format: str
    ) -> None:
        """Start the worker module and let it load. Raises PeerError with its reason when it cannot."""
        self.name = name
        self.formats = formats
        """Formats of its weights, named as ours: what it reads per token."""
        self.kv_format = kv_format
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", worker],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._has_case = False
        try:
            self.version = str(self._ask(**options)["version"])
        except PeerError:
            self.close()
            raise

    def prepare(self, case: Case, rounds: int) -> None:
        """See `Contestant.prepare`."""
        self._ask(do="prepare", case=asdict(case), rounds=rounds)
        self._has_case = True

    def run(self) -> float:
        """See `Contestant.run`."""
        return float(self._ask(do="run")["seconds"])

    def release(self) -> None:
        """See `Contestant.release`."""
        if self._has_case:
            self._has_case = False
            self._ask(do="release")

    def cpu_seconds(self) -> float:
        """See `Contestant.cpu_seconds`."""
        return process_cpu_seconds(self._process.pid)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise PeerError(f"its process ended ({error.strerror})") from error
        if not line:
            raise PeerError(f"its process ended with code {self._process.wait()}")
        answer = cast(dict[str, Any], json.loads(line))
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer


def start_peer(spec: PeerSpec, source: ModelSource, *, quant: str, threads: int) -> PeerContestant:
    """Start a peer on the same model or shape. Raises PeerError: not installed, or it cannot read this."""
    module, package = _PACKAGES[spec.engine]
    if find_spec(module) is None:
        raise PeerError(f"the package {package} is not installed (pip install {package})")
    config = source.config
    if any(config.windows):
        raise PeerError("it has no sliding window for this architecture")
    if spec.engine == "llama.cpp":
        path, formats = _gguf(spec, source, quant)
        options: dict[str, Any] = {"path": str(path), "threads": threads}
        kind = path.stem.rpartition("-")[2] if source.kind == "shape" else "GGUF"
        return PeerContestant(f"llama.cpp {kind}", _WORKERS[spec.engine], options, formats, "f16")
    if source.kind != "shape":
        raise PeerError("it is compared on shapes only (--shape)")
    options = {"shape": _shape_fields(config), "threads": threads}
    stored = "bf16" if spec.engine == "transformers" else "q8"
    formats = dict.fromkeys(source.tensors, stored)
    name = f"{spec.engine} {'bf16' if stored == 'bf16' else 'int8'}"
    kv_format = "bf16" if spec.engine == "transformers" else "f32"
    return PeerContestant(name, _WORKERS[spec.engine], options, formats, kv_format)


def _gguf(spec: PeerSpec, source: ModelSource, quant: str) -> tuple[Path, Mapping[str, str]]:
    if source.kind == "gguf":
        return source.path, packed_formats(source, "auto")
    if source.kind != "shape":
        raise PeerError("it reads GGUF files, and this model is none")
    if find_spec("gguf") is None:
        raise PeerError("the package gguf is needed to write a model for it (pip install gguf)")
    kind = spec.kind or _GGUF_OF_QUANT[quant]
    return gguf_path(source, kind), gguf_formats(source.config, kind)


def _shape_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "dim": config.dim, "num_layers": config.num_layers, "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size, "rope_theta": config.rope_theta, "norm_eps": config.norm_eps,
        "num_experts": config.num_experts, "experts_per_token": config.experts_per_token,
    }  # fmt: skip
