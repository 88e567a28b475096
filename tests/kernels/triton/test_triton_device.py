"""Which device a thread launches on (Triton asks the thread, not the memory that it is given), and what
recorded steps find there.
"""

import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels.triton import compute_on  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402


@pytest.fixture
def chosen(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def test_a_thread_computes_on_the_device_that_was_named_and_else_where_it_is(chosen):
    for name in ("cpu", "cuda", "cuda:1"):
        compute_on(torch.device(name))
    assert chosen == [torch.device("cuda:1")]


def test_every_step_and_every_choice_of_tokens_begins_with_its_device(chosen, monkeypatch):
    ops = TritonOps(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    own = ops.device
    monkeypatch.setattr("bise.kernels.triton.ops.compute_on", lambda device: chosen.append(device))
    ops.rope(np.ones(8), np.zeros(1, np.int32), 1.0)
    ops.sample(torch.zeros(1, 32, device=own), np.zeros((1, 5)), None)
    assert chosen == [own, own]


def test_angles_that_recorded_steps_look_up_stay_when_longer_ones_come():
    ops = TritonOps(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    frequencies = np.ones(8)
    recorded = weakref.ref(ops.rope(frequencies, np.array([9], np.int32), 1.0)[0])
    longer = ops.rope(frequencies, np.array([999], np.int32), 1.0)[0]
    assert recorded() is not None
    assert recorded() is not longer
    assert torch.equal(recorded(), longer[: len(recorded())])
