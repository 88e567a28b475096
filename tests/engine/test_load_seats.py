"""How many requests a loaded model runs at once, that one which is not loaded runs nothing, and the end."""

import os
import shutil
import subprocess
import sys
import threading

import pytest

from bise.engine.load import SEATS, load_model
from bise.engine.request import Request, SamplingParams
from bise.errors import ModelFileError
from bise.hub.embedded import embedded_path


def test_more_short_requests_run_at_once_than_full_contexts_were_planned_for():
    loaded = load_model(embedded_path(), context=256, max_sequences=6, threads=1, threaded=False)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for number in range(20):
        loaded.engine.submit(Request(token_ids=(1, 300 + number), params=params))
    loaded.engine.step()
    assert loaded.engine.stats().num_running == 6 * SEATS > 6
    loaded.close()


def test_a_model_that_is_refused_leaves_no_engine_behind(tmp_path):
    model = shutil.copytree(embedded_path(), tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": "warm"}')
    before = set(threading.enumerate())
    with pytest.raises(ModelFileError, match="temperature must be a number"):
        load_model(model, context=64, threads=1)
    assert "bise-engine" not in {thread.name for thread in set(threading.enumerate()) - before}


_NEVER_CLOSED = """
from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.hub.embedded import embedded_path
loaded = load_model(embedded_path(), context=64, threads=1)
loaded.engine.submit(Request(token_ids=(1, 300), params=SamplingParams(max_tokens=2))).result()
"""


def test_a_program_that_never_closes_its_model_ends_in_silence():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _NEVER_CLOSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
