"""Other engines on the same device in the same run: torch's own kernels, transformers, llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_models import MISTRAL, TOY
from gpu_timing import Record, gb_per_s, graph_seconds, seconds_of


def peers_of_kernels(scale: Any, found: Record, shapes: dict[str, tuple[int, int]]) -> list[Record]:
    """torch's own products of one row: bf16 by its BLAS, int4 by its own kernel. A peer that fails costs its
    own lines alone.
    """
    lines: list[Record] = []
    for name, (n, k) in shapes.items():
        x = torch.randn(1, k, device=scale.device, dtype=torch.bfloat16)
        for peer, measure in (("torch bf16", torch_bf16), ("torch int4", torch_int4)):
            try:
                line = measure(scale, found, n, k, x)
            except Exception as error:
                line = {"error": f"{type(error).__name__}: {error}"}
            lines.append({"peer": peer, "shape": name} | line)
    return lines


def torch_bf16(scale: Any, found: Record, n: int, k: int, x: torch.Tensor) -> Record:
    """The product of the device's BLAS."""
    size = n * k * 2
    copies = scale.pick(max(2, -(-(400 << 20) // size)), 1)
    matrices = [torch.randn(n, k, device=scale.device, dtype=x.dtype) for _ in range(copies)]
    seconds = graph_seconds(partial(blas_products, x, matrices), scale, copies)
    return {"us": seconds * 1e6, "share": size / seconds / 1e9 / gb_per_s(found)}


def blas_products(x: torch.Tensor, matrices: list[torch.Tensor]) -> None:
    """Multiply by the device's BLAS."""
    for matrix in matrices:
        torch.nn.functional.linear(x, matrix)


def torch_int4(scale: Any, found: Record, n: int, k: int, x: torch.Tensor) -> Record:
    """torch's int4 product (groups of 128) of one row."""
    if scale.device != "cuda":
        return {"skipped": "its kernel needs CUDA"}
    groups, size = 128, n * k // 2 + n * k // 128 * 4
    copies = max(2, -(-(400 << 20) // size))
    weights: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=scale.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.ones(k // groups, n, 2, device=scale.device, dtype=torch.bfloat16)))

    def run() -> None:
        for packed, scales in weights:
            torch.ops.aten._weight_int4pack_mm(x, packed, groups, scales)

    seconds = graph_seconds(run, scale, copies)
    return {"us": seconds * 1e6, "share": size / seconds / 1e9 / gb_per_s(found)}


def peers(scale: Any, found: Record, _: Any) -> Record:
    """transformers with a static cache, as it is and compiled: tokens per second at batch 1, bf16."""
    try:
        from transformers import MistralConfig, MistralForCausalLM, StaticCache
    except ImportError as error:
        return {"skipped": str(error)}
    c = scale.pick(MISTRAL, TOY)
    config = MistralConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, head_dim=c.head_dim,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_context, sliding_window=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if scale.device == "cuda" else torch.float32
    with torch.device(scale.device), torch.no_grad():
        torch.set_default_dtype(dtype)
        try:
            model = MistralForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    cache = StaticCache(config=config, max_cache_len=scale.pick(1024, 64))
    token = torch.ones((1, 1), dtype=torch.long, device=scale.device)
    place = torch.tensor([scale.pick(512, 20)], device=scale.device)

    def step(run: Any) -> object:
        return run(token, past_key_values=cache, cache_position=place, use_cache=True).logits

    lines: Record = {}
    with torch.no_grad():
        lines["static cache"] = 1 / seconds_of(lambda: step(model), scale)
        if scale.device == "cuda":
            try:
                compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
                lines["static cache, compiled"] = 1 / seconds_of(lambda: step(compiled), scale)
            except Exception as error:  # what was measured before it stays
                lines["static cache, compiled"] = f"{type(error).__name__}: {str(error)[:300]}"
    return {"tok_per_s": lines}


def llama_cpp(scale: Any, found: Record, _: Any) -> Record:
    """llama.cpp with all layers on the device: tokens per second at batch 1, and of a prompt of 512."""
    try:
        from llama_cpp import llama_supports_gpu_offload
    except ImportError as error:
        return {"skipped": f"{error}; docs/gpu.md tells how it is built for CUDA"}
    if scale.device == "cuda" and not llama_supports_gpu_offload():
        return {
            "skipped": "this llama-cpp-python is built for processors alone; docs/gpu.md tells how for CUDA"
        }
    from bise.bench.gguf_file import gguf_path
    from bise.bench.llama_worker import LlamaPeer
    from bise.bench.rounds import Case
    from bise.plan import shape_source

    config = replace(scale.pick(MISTRAL, TOY), vocab_size=scale.pick(MISTRAL.vocab_size, 512))
    kind = scale.pick("Q4_K_M", "Q8_0")  # rows of 256 columns are more than a toy has
    path = gguf_path(shape_source(scale.pick("gpu-7b", "gpu-toy"), config), kind)
    peer = LlamaPeer({"path": str(path), "threads": 4, "gpu_layers": 999})
    steps, depth = scale.pick((64, 512), (2, 8))
    lines: Record = {}
    for name, case in (
        ("decode", Case(op="decode", prompt=0, batch=1, context=depth, steps=steps)),
        ("prompt", Case(op="prefill", prompt=depth, batch=1, context=0, steps=0)),
    ):
        peer.prepare(case, 4)
        peer.run()
        lines[name] = case.tokens / median(peer.run() for _ in range(3))
        peer.release()
    return {"version": peer.version, "file": kind, "tok_per_s": lines}
