"""Every malformed model directory gives one clean line; every sound one opens, from its headers alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bise.errors import UserError
from bise.model.checkpoint import open_model
from bise.model.transformer import weight_shapes

sys.path.insert(0, str(Path(__file__).parent))
corpus = importlib.import_module("bad_models")
BAD = {case.name: case for case in corpus.BAD}
SOUND = {case.name: case for case in corpus.SOUND}

SECONDS = 5.0

IN_SUBPROCESS = [
    "st_sparse_header_length_64GiB", "st_sparse_header_of_zeros", "st_deep_arrays", "st_many_values",
    "st_many_empty_objects", "cfg_deep", "cfg_nine_megabytes", "cfg_a_thousand_layers", "ix_deep",
    "sf_fifo_model.safetensors", "sf_link_to_device_config.json",
]  # fmt: skip


def read_everything(path: Path) -> None:
    source = open_model(path)
    if (path / "cut-after-opening").exists():
        weights = path / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
    for tensor in source.tensors.values():
        tensor.floats(0, tensor.shape[0])


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(BAD) == len(corpus.BAD) >= 250
    assert len(SOUND) == len(corpus.SOUND) >= 30


@pytest.mark.parametrize("name", BAD)
def test_malformed_model_is_refused_in_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    case = BAD[name]
    directory = tmp_path / "model"
    directory.mkdir()
    case.build(directory)
    started = time.thread_time()
    with pytest.raises(UserError) as caught:
        read_everything(directory) if case.reads else open_model(directory)
    assert time.thread_time() - started < SECONDS
    message = str(caught.value)
    assert message.isprintable()
    assert 20 <= len(message) <= 1000
    assert case.mentions in message
    assert "secret'" not in message


@pytest.mark.parametrize("name", SOUND)
def test_sound_model_opens_with_every_weight_of_its_configuration(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    SOUND[name].build(directory)
    started = time.thread_time()
    source = open_model(directory)
    assert time.thread_time() - started < SECONDS
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == weight_shapes(source.config)
    assert np.isfinite(source.tensors["layers.0.wk"].floats(1, 7)).all()


LIMITED = """
import resource, sys, time
from pathlib import Path
from bise.errors import UserError
from bise.model.checkpoint import open_model
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
try:
    open_model(Path(sys.argv[1]))
    print("opened", end=" ")
except UserError as error:
    print("refused", end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def open_in_subprocess(directory: Path) -> tuple[str, int]:
    """Return (opened or refused, KiB above the start of the process) under limits on time and memory."""
    source = Path(__file__).parents[2] / "src"
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(directory)],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(source), "PATH": "", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr == ""
    outcome, size = run.stdout.split()
    return outcome, int(size)


@pytest.mark.parametrize("name", IN_SUBPROCESS)
def test_refusing_costs_little_memory(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    BAD[name].build(directory)
    outcome, grown = open_in_subprocess(directory)
    assert outcome == "refused"
    assert grown <= 256 << 10


def test_a_terabyte_is_opened_from_its_header_alone(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    SOUND["terabyte"].build(directory)
    started = time.thread_time()
    source = open_model(directory)
    assert time.thread_time() - started < 1.0
    assert sum(tensor.size_bytes for tensor in source.tensors.values()) > 1 << 40
    outcome, grown = open_in_subprocess(directory)
    assert outcome == "opened"
    assert grown <= 64 << 10
