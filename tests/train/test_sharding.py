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


def tune(model: Path, data: Path, out: Path, *options: str, processes: int = 1) -> list[dict[str, object]]:
    start = ["-m", "bise"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *start]
    command = [
        sys.executable, *start, "tune", "run", str(model), str(data), "--out", str(out), "--json",
        "--batch", "3", "--pass-tokens", "40", "--held-back", "0.2", *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("full", "model.safetensors"),
        pytest.param("lora", "adapter_model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(method, name, tiny_dir, data_path, tmp_path):
    options = ("--method", method, "--steps", "4", "--lr", "0.001", "--checkpoint-steps", "2")
    one = tune(tiny_dir, data_path, tmp_path / "one", *options)
    two = tune(tiny_dir, data_path, tmp_path / "two", *options, processes=2)
    assert [event["event"] for event in one] == [event["event"] for event in two]  # one process tells
    steps = [[event["loss"] for event in events if event["event"] == "step"] for events in (one, two)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
    alone, together = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert alone.keys() == together.keys()
    for key, tensor in alone.items():
        assert torch.allclose(tensor.float(), together[key].float(), atol=2e-4), key
