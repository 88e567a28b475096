"""What the sections of `gpu.py` time with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bise.kernels.triton.ops import TritonOps

Record = dict[str, Any]


def seconds_of(run: Callable[[], object], scale: Any, *, repeats: int = 30) -> float:
    """Return the median seconds of a call, by the device's own clock where there is one."""
    repeats = scale.pick(repeats, 1)
    if scale.device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def graph_seconds(run: Callable[[], object], scale: Any, launches: int) -> float:
    """Return the seconds of one of `launches` calls that `run` makes, recorded and replayed as one; with the
    time between two kernels.
    """
    if scale.device != "cuda":
        return seconds_of(run, scale) / launches
    run()
    torch.cuda.synchronize()
    # Some hundred launches, beside which the microseconds until a graph begins are nothing.
    rounds = max(1, 400 // launches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            run()
    return seconds_of(graph.replay, scale) / launches / rounds


def kernel_seconds(run: Callable[[], object], scale: Any) -> float | None:
    """Return the median seconds of the kernels that `run` launches, each from its own begin to its own end;
    None without a device.
    """
    if scale.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = sorted(end - begin for _, begin, end in spans(profiler, on_device=True))
    return found[len(found) // 2] / 1e6 if found else None


def spans(profiler: Any, on_device: bool) -> list[tuple[str, float, float]]:
    """Return (name, start, end) in us of what ran on the device (of torch's own operations, without one)."""
    found: list[tuple[str, float, float]] = []
    for event in profiler.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_device:
            found.append((event.name, event.time_range.start, event.time_range.end))
    return sorted(found, key=lambda span: span[1])


def ops_of(scale: Any) -> TritonOps:
    """Return the backend: bf16, or float32 in the interpreter, which has no bf16."""
    return TritonOps(torch.bfloat16 if scale.device == "cuda" else torch.float32, scale.device)


def kv_of(scale: Any) -> str:
    """Return the format of keys and values."""
    return "bf16" if scale.device == "cuda" else "f32"


def gb_per_s(found: Record) -> float:
    """Return the bandwidth that this run measured."""
    return found["bandwidth"]["read_gb_per_s"]
