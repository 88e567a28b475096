"""CTranslate2 as a peer: int8, a dense Mistral shape of random weights written once under BISE_HOME."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bise.bench.rounds import Case
from bise.bench.worker import serve
from bise.config import state_directory


class CTranslate2Peer:
    """A converted model behind a generator."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        ctranslate2: Any = import_module("ctranslate2")
        shape = options["shape"]
        if shape["num_experts"]:
            raise ValueError("it has no mixture of experts")
        self.version: str = ctranslate2.__version__
        self._vocab_size = int(shape["vocab_size"])
        self._generator: Any = ctranslate2.Generator(
            str(_model_directory(shape)),
            device="cpu",
            compute_type="int8",
            intra_threads=int(options["threads"]),
            inter_threads=1,
        )
        self._case: Case | None = None
        self._reading_s = 0.0

    def prepare(self, case: Case, rounds: int) -> None:
        """For decoding, time the prompts alone: a turn's seconds are those of the whole, less these."""
        self._case = case
        if case.op == "decode":
            self._generate(case.batch, case.context, 1)
            self._reading_s = min(self._generate(case.batch, case.context, 1) for _ in range(3))

    def run(self) -> float:
        """Read one prompt, or produce the case's tokens."""
        assert self._case is not None
        if self._case.op == "prefill":
            return self._generate(1, self._case.prompt, 1)
        whole = self._generate(self._case.batch, self._case.context, self._case.steps + 1)
        return max(whole - self._reading_s, 1e-9)

    def release(self) -> None:
        """Keep nothing."""
        self._case = None

    def _generate(self, batch: int, prompt: int, length: int) -> float:
        rng = np.random.default_rng(0)
        prompts = [[f"t{i}" for i in rng.integers(300, self._vocab_size, prompt)] for _ in range(batch)]
        started = time.perf_counter()
        self._generator.generate_batch(
            prompts, max_length=length, min_length=length, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - started


def _model_directory(shape: Mapping[str, Any]) -> Path:
    digest = zlib.crc32(json.dumps(shape, sort_keys=True).encode())
    path = state_directory("cache", "bench") / f"ctranslate2-{digest:08x}"
    if not (path / "model.bin").exists():
        path.mkdir(mode=0o700, exist_ok=True)
        _spec(shape).save(str(path))
    return path


def _spec(shape: Mapping[str, Any]) -> Any:
    common_spec: Any = import_module("ctranslate2.specs.common_spec")
    transformer_spec: Any = import_module("ctranslate2.specs.transformer_spec")
    dim, hidden, vocab = shape["dim"], shape["hidden_dim"], shape["vocab_size"]
    q_dim, kv_dim = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
    grouped = shape["num_kv_heads"] if shape["num_kv_heads"] != shape["num_heads"] else None
    maker: Any = transformer_spec.TransformerDecoderModelSpec
    spec = maker.from_config(
        shape["num_layers"], shape["num_heads"], activation=common_spec.Activation.SWISH, pre_norm=True,
        ffn_glu=True, rms_norm=True, rotary_dim=0, rotary_interleave=False, rotary_base=shape["rope_theta"],
        num_heads_kv=grouped, head_dim=shape["head_dim"],
    )  # fmt: skip
    pool = (np.random.default_rng(1).standard_normal(1 << 20) * 0.02).astype(np.float32)
    ones = np.ones(dim, np.float32)

    def matrix(*size: int) -> Any:
        return np.resize(pool, size)

    spec.decoder.scale_embeddings = False
    spec.decoder.embeddings.weight = matrix(vocab, dim)
    spec.decoder.layer_norm.gamma = ones
    spec.decoder.projection.weight = matrix(vocab, dim)
    for layer in spec.decoder.layer:
        layer.self_attention.layer_norm.gamma = ones
        layer.self_attention.linear[0].weight = matrix(q_dim + 2 * kv_dim, dim)
        layer.self_attention.linear[1].weight = matrix(dim, q_dim)
        layer.ffn.layer_norm.gamma = ones
        layer.ffn.linear_0.weight = matrix(hidden, dim)
        layer.ffn.linear_0_noact.weight = matrix(hidden, dim)
        layer.ffn.linear_1.weight = matrix(dim, hidden)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t1", "t2", "t0"
    spec.config.layer_norm_epsilon = shape["norm_eps"]
    spec.register_vocabulary([f"t{number}" for number in range(vocab)])
    spec.validate()
    spec.optimize(quantization="int8")
    return spec


if __name__ == "__main__":
    serve(CTranslate2Peer)
