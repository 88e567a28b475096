from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bise.cli.app import run

HERE = Path(__file__).parent
FAKE = HERE / "fake_model.py"


def _fake_module():
    spec = importlib.util.spec_from_file_location("fake_model", FAKE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_model"] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("bise: error: ")]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("BISE_HOME", str(home))
    monkeypatch.delenv("BISE_DEBUG", raising=False)
    monkeypatch.delenv("BISE_THREADS", raising=False)
    return home


@pytest.fixture
def model_dir(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture
def fake(monkeypatch, model_dir):
    """The fake that every load returns; change it before running."""
    module = _fake_module()
    loaded = module.fake_loaded(model_dir)
    monkeypatch.setitem(sys.modules, "bise.engine.load", module.stand_in(lambda path: loaded))
    return loaded


@pytest.fixture
def cli(home, monkeypatch, capfd):
    """Run the command line in this process, with its real error handling."""

    def call(*args: str, stdin: bytes = b"") -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run(list(args))
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def process(home):
    """Run the command line as a process of its own, with the fake model behind it."""

    def call(*args: str, stdin: bytes = b"", script: Path = FAKE, **env: str) -> Result:
        environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | env
        done = subprocess.run(
            [sys.executable, str(script), *args],
            input=stdin,
            capture_output=True,
            env=environment,
            timeout=60,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call
