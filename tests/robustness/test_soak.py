"""A small soak in CI, and proof that the check can fail; `make soak` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "soak.py"


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, check=False, timeout=110, env=environment,
    )  # fmt: skip


def test_many_small_requests_of_which_many_are_aborted_leak_nothing():
    done = soak("--requests", "900")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing leaked" in done.stdout
    assert " 0 preemptions" not in done.stdout


@pytest.mark.parametrize(
    ("leak", "message"), [("memory", "resident memory grew"), ("blocks", "blocks are lost")]
)
def test_the_soak_notices_a_leak(leak, message):
    done = soak("--requests", "300", "--leak", leak)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_soak_leaks_nothing():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
