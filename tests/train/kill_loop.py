"""Kill training with SIGKILL at random moments and look at what is left: `kill_loop.py checkpoints 200`.

One process imports PyTorch and forks those that are killed, so that a kill costs milliseconds.

- checkpoints N: N processes write checkpoints and announce each; the last announced one always loads.
- resume N: N runs are killed wherever they are and resumed until they end, with the bits of one never killed.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bise.train.checkpoint import load_latest, save_checkpoint
from bise.train.job import run_job
from bise.train.loop import Schedule
from bise.train.settings import JobSettings

SETTINGS = JobSettings(
    rank=4, held_back=0.2, schedule=Schedule(epochs=4, batch=4, checkpoint_steps=1, lr=0.01)
)


def start(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Fork a process that works and announces steps; return its id and where its announcements arrive."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.close(reading)
        work(lambda step: os.write(writing, f"{step}\n".encode()))
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)


def kill_after(process: int, reading: int, seconds: float) -> tuple[int, bool]:
    """Kill a process some time after its first word; return its last announcement, and if it had ended."""
    select.select([reading], [], [])
    killed = False
    while seconds > 0:
        ready, _, _ = select.select([], [], [], min(seconds, 0.01))
        assert not ready
        seconds -= 0.01
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0
    text = b""
    while part := os.read(reading, 1 << 16):
        text += part
    os.close(reading)
    steps = [int(line) for line in text.split() if line]
    return max(steps, default=0), not killed


def checkpoints(rounds: int, folder: Path, rng: random.Random) -> None:
    """Kill writers of checkpoints."""
    for number in range(rounds):
        run = folder / str(number)

        def work(announce: Callable[[int], None], run: Path = run) -> None:
            for step in range(1, 100_000):
                save_checkpoint(
                    run, step, {"x": (50_000,)}, [torch.full((50_000,), float(step))], {"step": step}
                )
                announce(step)

        seen, _ = kill_after(*start(work), rng.random() * 0.08)
        found = load_latest(run)
        assert found is not None, f"round {number}: nothing loads"
        step = int(str(found.progress["step"]))
        assert step >= seen, f"round {number}: {seen} was announced, {step} is there"
        assert torch.equal(found.whole("x"), torch.full((50_000,), float(step))), number


def resume(rounds: int, folder: Path, rng: random.Random, model: Path, data: Path) -> None:
    """Kill and resume runs."""
    name = "adapter_model.safetensors"

    def train(out: Path, announce: Callable[[int], None], *, again: bool) -> None:
        announce(0)
        run_job(
            model, data, out, SETTINGS, resume=again, should_stop=lambda: False,
            report=lambda event: announce(event["step"]) if event["event"] == "checkpoint" else None,
        )  # fmt: skip

    train(folder / "whole", lambda step: None, again=False)
    for number in range(rounds):
        out = folder / f"out{number}"
        for tries in range(100):
            again = (folder / f"out{number}.run").exists()
            process, reading = start(lambda announce, out=out, again=again: train(out, announce, again=again))
            # On a busy machine a run may not reach its next checkpoint in this time: later ones get more.
            _, is_over = kill_after(process, reading, rng.random() * 0.8 * max(1, tries / 10))
            if out.exists():
                break
            assert not is_over
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes(), f"round {number}"


def main() -> None:
    """Run one of the loops."""
    kind, rounds, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "checkpoints":
            checkpoints(int(rounds), Path(folder), rng)
        else:
            resume(int(rounds), Path(folder), rng, *map(Path, rest))
    print(json.dumps({"kind": kind, "rounds": int(rounds), "bad": 0}))


if __name__ == "__main__":
    main()
