"""kill -9, a full disk, a curve that must stay, gradients of every op."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bise.errors import StoreError
from bise.kernels import AttentionMeta
from bise.kernels.torch import TorchOps
from bise.train.checkpoint import load_latest, save_checkpoint
from bise.train.job import run_job
from bise.train.loop import Schedule
from bise.train.settings import JobSettings

HERE = Path(__file__).parent


def kill_loop(*arguments: str, timeout: float) -> None:
    command = [sys.executable, str(HERE / "kill_loop.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["bad"] == 0


@pytest.mark.timeout(400)
def test_the_last_announced_checkpoint_loads_after_kill_9_at_50_moments():
    kill_loop("checkpoints", "50", timeout=350)


@pytest.mark.timeout(400)
def test_runs_that_were_killed_and_resumed_have_the_bits_of_one_that_was_not(tiny_dir, data_path):
    kill_loop("resume", "2", str(tiny_dir), str(data_path), timeout=350)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_last_announced_checkpoint_loads_after_kill_9_at_200_moments():
    kill_loop("checkpoints", "200", timeout=1700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_20_of_20_killed_runs_resume_bit_equal(tiny_dir, data_path):
    kill_loop("resume", "20", str(tiny_dir), str(data_path), timeout=1700)


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path):
    process = os.fork()
    if process == 0:  # a limit on the size of files stands for a disk without room: the same failing writes
        code = 1
        try:
            save_checkpoint(tmp_path, 1, {"x": (1000,)}, [torch.ones(1000)], {"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                save_checkpoint(tmp_path, 2, {"x": (100_000,)}, [torch.ones(100_000)], {"step": 2})
            except StoreError as error:
                code = 0 if "\n" not in str(error) and "step 2" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found = load_latest(tmp_path)
    assert found.progress == {"step": 1}
    assert torch.equal(found.whole("x"), torch.ones(1000))
    assert torch.equal(found.rows("x", 10, 20), torch.ones(10))


def test_the_loss_curve_of_a_fixed_run_is_the_recorded_one(tiny_dir, data_path, tmp_path):
    events = []
    settings = JobSettings(
        rank=4, held_back=0.2, schedule=Schedule(max_steps=200, batch=4, lr=0.003, patience=0, seed=7)
    )
    run_job(
        tiny_dir, data_path, tmp_path / "out", settings,
        resume=False, report=events.append, should_stop=lambda: False,
    )  # fmt: skip
    losses = [event["loss"] for event in events if event["event"] == "step"][9::10]
    file = HERE / "recorded_curve.json"
    if not file.exists():
        file.write_text(json.dumps(losses) + "\n")
    # Sums in another order move a loss in its sixth digit; 200 steps let that grow a thousandfold at most.
    assert losses == pytest.approx(json.loads(file.read_text()), rel=5e-3, abs=5e-4)
    assert losses[-1] < 0.3 * losses[0]


def meta(lengths: list[int]) -> AttentionMeta:
    return AttentionMeta(
        q_start=np.cumsum([0, *lengths], dtype=np.int32),
        q_pos=np.zeros(len(lengths), np.int32),
        block_table=np.zeros((len(lengths), 0), np.int32),
        slots=np.zeros(0, np.int32),
    )


def _rope(ops: TorchOps, lengths: list[int]):
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return ops.rope(10000.0 ** -(np.arange(0, 8, 2) / 8), positions, 1.0)


def _attend(window, lengths):
    def run(ops, q, k, v):
        return ops.attend(q, k, v, _rope(ops, lengths), meta(lengths), None, 8, window)

    return run


ROWS = np.array([0, 2, 3], np.intp)
IDS = np.array([3, 0, 3, 5], np.int32)
OPS = {
    "embed": (lambda ops, table: ops.embed(table, IDS), [(6, 8)]),
    "norm": (lambda ops, x, w: ops.norm(x, w, 1e-5), [(4, 8), (8,)]),
    "add_norm": (lambda ops, x, y, w: sum(ops.add_norm(x, y, w, 1e-5)), [(4, 8), (4, 8), (8,)]),
    "linear": (lambda ops, x, a, b: torch.cat(ops.linear(x, [a, b]), 1), [(4, 8), (6, 8), (5, 8)]),
    "attend": (_attend(None, [6]), [(6, 32), (6, 16), (6, 16)]),
    "attend within a window": (_attend(3, [6]), [(6, 32), (6, 16), (6, 16)]),
    "attend over texts": (_attend(4, [2, 5, 1]), [(8, 32), (8, 16), (8, 16)]),
    "mlp": (lambda ops, x, *w: ops.mlp(x, ops.experts([w])), [(4, 8), (12, 8), (12, 8), (8, 12)]),
    "moe": (
        lambda ops, x, r, *w: ops.moe(x, r, ops.experts([w[0:3], w[3:6], w[6:9]]), 2),
        [(5, 8), (3, 8), *[(12, 8), (12, 8), (8, 12)] * 3],
    ),
    "add_lora": (
        lambda ops, y, x, a, b: ops.add_lora(y, x, ops.lora(a, b, 0.7), ROWS),
        [(4, 6), (4, 8), (3, 8), (6, 3)],
    ),
    "gated": (lambda ops, gate, up: ops.gated(gate, up), [(4, 8), (4, 8)]),
    "logits": (lambda ops, x, head: ops.logits(x, head), [(4, 8), (9, 8)]),
}


@pytest.mark.parametrize("name", OPS)
def test_the_backward_of_every_op_is_that_of_finite_differences_and_of_float64(name):
    run, shapes = OPS[name]
    generator = torch.Generator().manual_seed(5)
    exact = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]
    ops = TorchOps(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: run(ops, *tensors), exact, eps=1e-6, atol=1e-6)
    narrow = [tensor.detach().float().requires_grad_() for tensor in exact]
    pull = torch.randn(run(ops, *exact).shape, generator=generator, dtype=torch.float64)
    (run(ops, *exact) * pull).sum().backward()
    (run(TorchOps(torch.float32), *narrow) * pull.float()).sum().backward()
    for wide, single in zip(exact, narrow, strict=True):
        error = torch.linalg.vector_norm(single.grad.double() - wide.grad)
        assert float(error) <= 1e-5 * max(1.0, float(torch.linalg.vector_norm(wide.grad)))


def test_every_op_that_training_uses_is_checked():
    used = {name for name in vars(TorchOps) if not name.startswith("_") and callable(getattr(TorchOps, name))}
    no_backward = {
        "layer", "weight", "vector", "packed", "floats", "together", "pages", "read_block", "write_block",
        "rope", "experts", "lora", "route", "mix",
    }  # fmt: skip
    assert used - no_backward <= {name.split()[0] for name in OPS}
