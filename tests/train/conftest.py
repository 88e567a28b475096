from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _load():
    spec = importlib.util.spec_from_file_location("tiny_model", Path(__file__).with_name("tiny_model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_model"] = module
    spec.loader.exec_module(module)
    return module


tiny = _load()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """The directory of a model small enough to train in a second."""
    return tiny.write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def data_path(tmp_path) -> Path:
    return tiny.write_data(tmp_path / "data.jsonl")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BISE_THREADS", "1")
    torch.set_num_threads(1)
