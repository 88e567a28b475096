"""Hugging Face transformers as a peer: bfloat16 on the CPU, its own cache, an eager loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bise.bench.rounds import Case
from bise.bench.worker import serve


class TransformersPeer:
    """A model of random weights in a shape."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        import torch
        import transformers

        self._torch: Any = torch
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        torch.set_num_threads(int(options["threads"]))
        shape = options["shape"]
        fields: dict[str, Any] = {
            "hidden_size": shape["dim"], "num_hidden_layers": shape["num_layers"],
            "num_attention_heads": shape["num_heads"], "num_key_value_heads": shape["num_kv_heads"],
            "head_dim": shape["head_dim"], "intermediate_size": shape["hidden_dim"],
            "vocab_size": shape["vocab_size"], "rms_norm_eps": shape["norm_eps"], "sliding_window": None,
            "max_position_embeddings": 1 << 17,
        }  # fmt: skip
        maker: Any = transformers
        if shape["num_experts"]:
            config = maker.MixtralConfig(
                num_local_experts=shape["num_experts"],
                num_experts_per_tok=shape["experts_per_token"],
                **fields,
            )
        else:
            config = maker.MistralConfig(**fields)
        with torch.device("cpu"):
            self._model = maker.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self._vocab_size = int(shape["vocab_size"])
        self._case: Case | None = None
        self._cache: Any = None
        self._last: Any = None

    def prepare(self, case: Case, rounds: int) -> None:
        """Read the prompts of all sequences."""
        self._case = case
        if case.op == "decode":
            self._cache = self._read(case.batch, case.context).past_key_values
            self._last = self._tokens(case.batch, 1)

    def run(self) -> float:
        """Read one prompt, or take the case's steps."""
        assert self._case is not None
        started = time.perf_counter()
        if self._case.op == "prefill":
            self._read(1, self._case.prompt)
            return time.perf_counter() - started
        with self._torch.inference_mode():
            for _ in range(self._case.steps):
                out = self._model(self._last, past_key_values=self._cache, use_cache=True)
                self._cache = out.past_key_values
                self._last = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - started

    def release(self) -> None:
        """Drop the cache."""
        self._cache = self._last = None

    def _read(self, batch: int, length: int) -> Any:
        with self._torch.inference_mode():
            return self._model(self._tokens(batch, length), use_cache=True, logits_to_keep=1)

    def _tokens(self, batch: int, length: int) -> Any:
        return self._torch.randint(300, self._vocab_size, (batch, length))


if __name__ == "__main__":
    serve(TransformersPeer)
