"""The sections of `gpu.py`. Each returns a record; `found` holds those of the sections before it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import MISTRAL, MIXTRAL, TOY, TOY_EXPERTS, Runs, random_matrix, with_window, write_model
from gpu_peers import llama_cpp, peers, peers_of_kernels
from gpu_timing import Record, gb_per_s, graph_seconds, kernel_seconds, kv_of, ops_of, seconds_of, spans

from bise.engine.memory import STEP_TOKENS
from bise.kernels.triton.lazy import Rows
from bise.kernels.triton.matmul import Normed
from bise.kernels.triton.ops import TritonOps

FORMS = {"bf16": 0, "int8": 8, "int4": 4}


def bandwidth(scale: Any, found: Record, _: Any) -> Record:
    """What this device gives: reading its memory alone, copying it, multiplying matrices."""
    count = scale.pick(1 << 30, 1 << 12)
    source = torch.empty(count, dtype=torch.float32, device=scale.device).fill_(1)
    target = torch.empty_like(source)
    read = 4 * count / seconds_of(lambda: source.sum(), scale)
    copied = 8 * count / seconds_of(lambda: target.copy_(source), scale)
    best = max(read, copied)
    size = scale.pick(8192, 64)
    square = torch.randn(size, size, device=scale.device).to(torch.bfloat16)  # zeros would be faster
    flops = 2 * size**3 / seconds_of(lambda: square @ square, scale, repeats=10)
    return {"read_gb_per_s": best / 1e9, "sum_gb_per_s": read / 1e9, "copy_gb_per_s": copied / 1e9,
            "bf16_tflops": flops / 1e12}  # fmt: skip


def kernels(scale: Any, found: Record, _: Any) -> Record:
    """Products of one row at the four shapes of a Mistral layer, as a layer launches them; peers beside them.

    Copies of a matrix that are together larger than the cache are gone through in turn. `us` has the time to
    the next kernel in it, `kernel_us` has not.
    """
    ops = ops_of(scale)
    e, f, q = scale.pick((4096, 14336, 6144), (64, 128, 128))
    shapes = {"qkv": (q, e), "wo": (e, e), "gate_up": (f, e), "down": (e, f)}
    rows = scale.pick((1, 4, 16, 64), (1,))
    lines: list[Record] = []
    for form, bits in FORMS.items():
        for name, (n, k) in shapes.items():
            first = random_matrix(n, k, bits, ops)
            size = first.size_bytes * (2 if name == "gate_up" else 1)
            copies = scale.pick(max(2, -(-(400 << 20) // size)), 1)
            matrices = [first] + [random_matrix(n, k, bits, ops) for _ in range(copies - 1)]
            ups = [random_matrix(n, k, bits, ops) for _ in range(copies)] if name == "gate_up" else []
            for count in rows:
                x = torch.randn(count, k, device=ops.device)
                stream = torch.randn(count, n, device=ops.device)
                squares = (x.view(count, -1, 64) ** 2).sum(-1)
                # Few rows are normed by the product itself, more of them before.
                normed = ops._operand(
                    Rows(Normed(x, squares, torch.ones(k, device=ops.device), 1e-5), ops.dtype)
                )
                plain = x.to(ops.dtype)

                run = partial(layer_products, name, ops, matrices, ups, normed, plain, stream)
                seconds, own = graph_seconds(run, scale, copies), kernel_seconds(run, scale)
                gb, alone = size / seconds / 1e9, own and size / own / 1e9
                lines.append(
                    {"form": form, "shape": name, "rows": count, "bytes": size,
                     "operations": 2 * n * k * count * (2 if name == "gate_up" else 1), "us": seconds * 1e6,
                     "gb_per_s": gb, "share": gb / gb_per_s(found),
                     "kernel_us": own and own * 1e6, "kernel_share": alone and alone / gb_per_s(found)}
                )  # fmt: skip
    return {"lines": lines, "target_share": 0.85, "peers": peers_of_kernels(scale, found, shapes)}


def layer_products(
    name: str, ops: TritonOps, matrices: list[Any], ups: list[Any], normed: Any, plain: Any, stream: Any
) -> None:
    """Multiply as a layer does: with the norm before, with the gate or the residual sum behind."""
    for index, matrix in enumerate(matrices):
        if name == "qkv":
            ops._matmul(normed, matrix)
        elif name == "gate_up":
            ops._matmul.gate(normed, matrix, ups[index])
        else:
            ops._matmul.add(plain, matrix, stream)


def decode_line(scale: Any, found: Record, runs: Runs, position: int, rows: int) -> Record:
    """Return one line: a step of `rows` sequences at a position."""
    batch = runs.batch(position, 1, rows)
    with torch.no_grad():
        seconds = seconds_of(lambda: runs.step(batch), scale)
    read = runs.weight_bytes + rows * runs.kv_bytes(position)
    if runs.config.num_experts and rows > 1:
        read = 0  # which experts a batch wants is chance: no floor is given
    floor = read / gb_per_s(found) / 1e9
    return {
        "rows": rows, "position": position, "ms": seconds * 1e3, "tok_per_s": rows / seconds, "bytes": read,
        "floor_ms": floor * 1e3, "share": floor / seconds,
    }  # fmt: skip


def decode(scale: Any, found: Record, _: Any) -> Record:
    """Whole steps at batch 1 in three widths, and a mixture in int4."""
    config, mixture = scale.pick((MISTRAL, MIXTRAL), (TOY, TOY_EXPERTS))
    position = scale.pick(512, 40)
    lines: Record = {}
    for form, bits in FORMS.items():
        runs = Runs(config, bits, ops_of(scale), rows=1, context=scale.pick(1024, 64), kv=kv_of(scale))
        lines[form] = decode_line(scale, found, runs, position, 1)
        del runs
    runs = Runs(mixture, 4, ops_of(scale), rows=1, context=scale.pick(1024, 64), kv=kv_of(scale))
    lines["mixture int4"] = decode_line(scale, found, runs, position, 1)
    targets = {"bf16": 0.7, "int8": 0.55, "int4": 0.4, "mixture int4": 0.4}
    stretch = {"bf16": 0.84, "int8": 0.73, "int4": 0.64, "mixture int4": 0.64}
    return {"lines": lines, "target_shares": targets, "stretch_shares": stretch}


def window(scale: Any, found: Record, _: Any) -> Record:
    """A step late in a text under a window against one early in it; keys and values in 16 and in 8 bits."""
    size, far, near = scale.pick((4096, 32768, 4096), (64, 256, 64))
    config = with_window(scale.pick(MISTRAL, TOY), size)
    lines: Record = {}
    for kv in (kv_of(scale), "q8"):
        runs = Runs(config, 4, ops_of(scale), rows=1, context=far, kv=kv)
        late = decode_line(scale, found, runs, far, 1)
        early = decode_line(scale, found, runs, near, 1)
        lines[kv] = {"far": late, "near": early, "slower": late["ms"] / early["ms"] - 1}
        del runs
    return {"lines": lines, "target_slower": 0.1}


def batch(scale: Any, found: Record, _: Any) -> Record:
    """64 sequences at once, bf16."""
    rows = scale.pick(64, 3)
    runs = Runs(
        scale.pick(MISTRAL, TOY), 0, ops_of(scale), rows=rows, context=scale.pick(1024, 64), kv=kv_of(scale)
    )
    lines = [
        decode_line(scale, found, runs, scale.pick(1024, 40), count)
        for count in scale.pick((8, 16, 32, 64), (3,))
    ]
    return {"lines": lines, "target_share": 0.6}


def prefill(scale: Any, found: Record, _: Any) -> Record:
    """Prompts of 4k tokens and, under a window of 4,096, of 32k: in the engine's own steps, in long ones."""
    size = scale.pick(4096, 64)
    config = with_window(scale.pick(MISTRAL, TOY), size)
    long, short = scale.pick((32768, 4096), (160, 64))
    lines: Record = {}
    for form, bits in (("bf16", 0), ("int4", 4)):
        runs = Runs(config, bits, ops_of(scale), rows=1, context=long, kv=kv_of(scale))
        for chunk in scale.pick((STEP_TOKENS, 4096), (64,)):
            with torch.no_grad():
                rates = {
                    str(count): count / seconds_of(partial(runs.prefill, count, chunk), scale, repeats=3)
                    for count in (short, long)
                }
            ratio = rates[str(long)] / rates[str(short)]
            lines[f"{form}, {chunk} a step"] = {"tok_per_s": rates, "long_over_short": ratio}
        del runs
    return {"lines": lines, "target_tok_per_s": 30000, "target_long_over_short": 0.85}


def same_bits(scale: Any, found: Record, _: Any) -> Record:
    """What equal bits cost: this backend's products against the fastest that the device's BLAS has."""
    ops = ops_of(scale)
    n, k = scale.pick((4096, 4096), (64, 64))
    matrix = random_matrix(n, k, 0, ops)
    dense = torch.randn(n, k, device=ops.device, dtype=ops.dtype)
    lines: list[Record] = []
    for rows in scale.pick((1, 16, 64, 512, 4096), (1, 20)):
        x = torch.randn(rows, k, device=ops.device).to(ops.dtype)
        own = graph_seconds(lambda x=x: [ops._matmul(x, matrix) for _ in range(8)], scale, 8)
        free = graph_seconds(lambda x=x: [torch.nn.functional.linear(x, dense) for _ in range(8)], scale, 8)
        lines.append({"rows": rows, "own_us": own * 1e6, "relaxed_us": free * 1e6, "cost": own / free - 1})
    return {"lines": lines}


def sampling(scale: Any, found: Record, _: Any) -> Record:
    """Choosing tokens from logits that are on the device."""
    import numpy as np

    from bise.kernels.triton.sampling import sample

    vocab = scale.pick(32768, 64)
    settings = {"greedy": (0.0, 0, 1.0, 0.0), "draw": (0.8, 0, 1.0, 0.0), "top_p": (0.8, 0, 0.9, 0.0),
                "top_k": (0.8, 40, 1.0, 0.0)}  # fmt: skip
    lines: Record = {}
    for rows in scale.pick((1, 64), (2,)):
        logits = torch.randn(rows, vocab, device=scale.device)
        for name, setting in settings.items():
            parameters = np.array([(*setting, 0.5)] * rows)
            seconds = seconds_of(lambda p=parameters, x=logits: sample(x, p, None), scale)
            lines[f"{name} {rows}"] = seconds * 1e6
    return {"us": lines}


def profile(scale: Any, found: Record, _: Any) -> Record:
    """One decoded step as the device saw it: launches and time of each kernel, and the time between them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler_of

    on_device = scale.device == "cuda"
    runs = Runs(
        scale.pick(MISTRAL, TOY), 4, ops_of(scale), rows=1, context=scale.pick(1024, 64), kv=kv_of(scale)
    )
    position = scale.pick(512, 40)
    with torch.no_grad():
        runs.decode(position, 1)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
        with profiler_of(activities=activities) as profiler:
            runs.decode(position, 1)
            if on_device:
                torch.cuda.synchronize()
    kernels: dict[str, Record] = {}
    between, last = 0.0, None
    for name, begin, end in spans(profiler, on_device):
        entry = kernels.setdefault(name[:60], {"launches": 0, "us": 0.0})
        entry["launches"] += 1
        entry["us"] += end - begin
        if last is not None:
            between += max(0.0, begin - last)
        last = end if last is None else max(last, end)
    busy = sum(entry["us"] for entry in kernels.values())
    return {"kernels": kernels, "busy_us": busy, "between_us": between,
            "launches": sum(entry["launches"] for entry in kernels.values())}  # fmt: skip


def start(scale: Any, found: Record, arguments: Any) -> Record:
    """From the start of a program to its first token, with the model's files in the page cache: of a model
    that was given, else of random weights, written for this.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch) / "model"
            write_model(scale.pick(MISTRAL, replace(TOY, vocab_size=4096)), model, torch.device(scale.device))
        command = [
            sys.executable, "-m", "bise", "generate", str(model), "-p", "Hello", "--max-tokens", "1",
            "--ignore-eos", "--quant", "bf16", "--device", scale.device, "--dtype", scale.pick("bf16", "f32"),
        ]  # fmt: skip
        times: list[float] = []
        for _ in range(3):  # the first one fills the page cache and compiles the kernels
            began = time.perf_counter()
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-300:])
            times.append(time.perf_counter() - began)
    return {"first_seconds": times[0], "seconds": min(times[1:]), "target_seconds": 10}


def roofline(scale: Any, found: Record, arguments: Any) -> Record:
    """A picture of the products under the device's roofs, as measured in this run, beside the result."""
    from bise.bench.roofline import draw_roofline
    from bise.plan import MachineLimits

    if "lines" not in found.get("kernels", {}):
        return {"skipped": "needs the section kernels"}
    rows = scale.pick((1, 64), (1,))
    ops = [
        {"op": f"{line['form']} {line['shape']}", "phase": f"{line['rows']} rows",
         "gops": line["operations"] / line["us"] / 1e3, "ops_per_byte": line["operations"] / line["bytes"]}
        for line in found["kernels"]["lines"] if line["rows"] in rows
    ]  # fmt: skip
    limits = MachineLimits(
        read_bytes_s=1e9 * gb_per_s(found),
        int8_ops_s=None,
        float_ops_s=1e12 * found["bandwidth"]["bf16_tflops"],
    )
    path = arguments.out.with_suffix(".svg")
    path.write_text(draw_roofline(ops, limits, "products of a Mistral layer", decades=(2.0, 6.0)), "utf-8")
    return {"picture": path.name}


SECTIONS: dict[str, Callable[..., Record]] = {
    section.__name__: section
    for section in (
        bandwidth,
        kernels,
        roofline,
        decode,
        window,
        batch,
        prefill,
        profile,
        same_bits,
        sampling,
        start,
        peers,
        llama_cpp,
    )
}
