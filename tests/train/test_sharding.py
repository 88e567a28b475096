"""Two processes over gloo make what one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bise.train.job import run_job
from bise.train.loop import Schedule
from bise.train.settings import JobSettings


def tune(model: Path, data: Path, out: Path, *options: str, processes: int = 1) -> list[dict[str, object]]:
    start = ["-m", "bise"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *start]
    command = [
        sys.executable, *start, "tune", "run", str(model), str(data), "--out", str(out), "--json",
        "--batch", "3", "--pass-tokens", "40", *options,
    ]  # fmt: skip
    # Where one of them dies by a signal, its stack says where: seen once, on a busy machine, and never since.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCH_DISTRIBUTED_DEBUG": "OFF",
        "PYTHONFAULTHANDLER": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "more", "name"),
    [
        ("full", ("--recompute",), "model.safetensors"),
        pytest.param("full", (), "model.safetensors", marks=pytest.mark.slow),
        pytest.param("lora", (), "adapter_model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(method, more, name, tiny_dir, data_path, tmp_path):
    options = ("--method", method, *more, "--steps", "4", "--lr", "0.001", "--checkpoint-steps", "2",
               "--held-back", "0.2")  # fmt: skip
    one = []
    schedule = Schedule(max_steps=4, batch=3, pass_tokens=40, lr=0.001, checkpoint_steps=2)
    run_job(
        tiny_dir, data_path, tmp_path / "one", JobSettings(method=method, held_back=0.2, schedule=schedule),
        resume=False, report=one.append, should_stop=lambda: False,
    )  # fmt: skip
    one.append({"event": "finished"})  # the command line's own word
    two = tune(tiny_dir, data_path, tmp_path / "two", *options, processes=2)
    assert [event["event"] for event in one] == [event["event"] for event in two]  # one process tells
    steps = [[event["loss"] for event in events if event["event"] == "step"] for events in (one, two)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    alone, together = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        assert torch.allclose(tensor.float(), together[key].float(), atol=2e-4), key


def peak_bytes(events: list[dict[str, object]]) -> int:
    """Return the peak of the process that held most while steps were made, before anything was gathered."""
    return [event["memory_bytes"] for event in events if event["event"] == "step"][-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_of_two_processes_holds_less_than_one_alone(data_path, tmp_path, monkeypatch):
    import tiny_model

    # Freed memory goes back at once, so that peaks count what is held and not what lies between.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    layers, dim, hidden = 12, 256, 2560
    model = tiny_model.write_tiny_model(tmp_path / "model", num_layers=layers, dim=dim, hidden_dim=hidden)
    options = ("--method", "full", "--steps", "2", "--lr", "0.0001", "--held-back", "0")
    one = tune(model, data_path, tmp_path / "one", *options)
    two = tune(model, data_path, tmp_path / "two", *options, processes=2)
    steps = [[event["loss"] for event in events if event["event"] == "step"] for events in (one, two)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    # Alone, a process holds weights, gradients and two moments: four times the matrices. Of two, each holds
    # half of that, and a layer at a time whole with its gradient.
    matrices = 4 * layers * 3 * dim * hidden
    assert peak_bytes(two) < peak_bytes(one) - 0.5 * matrices
