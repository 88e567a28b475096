"""Run models on a device that compiles but does not compute: `dry_device.py [compile]`.

Everything is as on a GPU up to the launch: arguments are specialised, grids are checked. What a kernel would
have written stays zero. Prints one JSON object: the kernels that each kind of step needed and the ones before
it did not, and with `compile` also what kept one from being compiled for Hopper.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from gpu_models import Runs, shape_of, with_window

from bise.kernels.triton import sampling
from bise.kernels.triton.launches import Card, least_rows_of
from bise.kernels.triton.ops import TritonOps

HIGHEST_GRID = (2**31 - 1, 65535, 65535)
SHARED = 227 << 10


class Hopper:
    """What Triton asks of a device."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Launches:
    """Takes the place of every launch."""

    def __init__(self, compiles):
        self.new = Counter()
        self.faults = []
        prepare, compile_it = JITFunction.run, JITFunction._do_compile

        def run(function, *args, grid, warmup, **options):
            for size, most in zip(grid, HIGHEST_GRID, strict=False):
                assert 0 < size <= most, (function.__name__, grid)
            return prepare(function, *args, grid=grid, warmup=True, **options)

        def make(function, key, signature, device, *others):
            self.new[function.__name__] += 1
            made = function.device_caches[device][0][key] = object()
            if compiles:
                try:
                    made = compile_it(function, key, signature, device, *others)
                    assert made.metadata.shared <= SHARED, f"{made.metadata.shared} bytes on chip"
                except Exception as error:
                    self.faults.append(f"{function.__name__}: {str(error)[-400:]}")
            return made

        JITFunction.run, JITFunction._do_compile = run, make

    def taken(self):
        found, self.new = dict(self.new), Counter()
        return found


def as_hopper(ops):
    ops._matmul.card = Card(least_rows=least_rows_of(9, triton.__version__))
    return ops


def runs_of(bits, *, experts=0, kv="bf16", window=None, dtype=torch.bfloat16):
    few = {"num_experts": experts, "experts_per_token": 2} if experts else {}
    config = shape_of(
        "mixtral" if experts else "mistral", 1024, (8, 2, 128), 2048, vocab_size=512, num_layers=1,
        max_context=2048, **few,
    )  # fmt: skip
    ops = as_hopper(TritonOps(dtype, "cpu"))
    return Runs(with_window(config, window), bits, ops, rows=64, context=1024, kv=kv)


def main():
    compiles = sys.argv[1:] == ["compile"]
    driver.set_active(Hopper())
    torch.empty = lambda *args, **options: torch.zeros(*args, **options)
    launches, found = Launches(compiles), {}
    dense = runs_of(4)
    for rows in (1, 2, 3, 4, 16, 17, 24, 64):
        dense.decode(700, rows)
    found["dense, decoded"] = launches.taken()
    for rows in (17, 300, 500):
        dense.prefill(rows, rows)
    found["dense, prompts"] = launches.taken()
    for rows in (18, 19, 20, 32, 301, 302, 304, 501, 502, 512):
        dense.prefill(rows, rows)
    for rows, position in ((2, 40), (5, 600), (6, 1000), (8, 513)):
        dense.decode(position, rows)
    for rows in (1, 2, 3, 64):
        sampling.sample(torch.zeros(rows, 512), np.zeros((rows, 5)), None)
    found["other numbers of rows, and sampling"] = launches.taken()
    mixture = runs_of(4, experts=8)
    for rows in (1, 4, 5, 64):
        mixture.decode(700, rows)
    for rows in (17, 300):
        mixture.prefill(rows, rows)
    found["mixture"] = launches.taken()
    if compiles:
        for runs in (
            runs_of(0, window=256),
            runs_of(8, kv="q8"),
            runs_of(0, experts=8),
            runs_of(4, kv="f16", dtype=torch.float16),
            runs_of(0, kv="f32", dtype=torch.float32),
        ):
            for rows in (1, 2, 24, 64):
                runs.decode(700, rows)
            for rows in (17, 300, 512):
                runs.prefill(rows, rows)
        found["other types and formats"] = launches.taken()
    print(json.dumps({"new": found, "faults": launches.faults}))


if __name__ == "__main__":
    main()
