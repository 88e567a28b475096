"""Which device a thread launches on (Triton asks the thread, not the memory that it is given), and what
recorded steps find there.
"""

import weakref
from contextlib import contextmanager, nullcontext
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.engine.device import make_ops  # noqa: E402
from bise.engine.graphs import CudaRecorder  # noqa: E402
from bise.engine.placement import Placement  # noqa: E402
from bise.errors import ConfigError  # noqa: E402
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


def test_one_thread_records_at_a_time(monkeypatch):
    """PyTorch waits for the device before it records, which breaks off what another thread records."""
    under_way, most, is_tried = [], [], Event()

    @contextmanager
    def recording(*_, **__):
        under_way.append(None)
        most.append(len(under_way))
        yield
        under_way.pop()

    for name, value in {
        "graph_pool_handle": lambda: (0, 1), "Stream": lambda device: None, "graph": recording,
        "device": lambda device: nullcontext(), "CUDAGraph": lambda: SimpleNamespace(replay=None),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    first, second = (CudaRecorder(torch.device("cuda")) for _ in range(2))
    other = Thread(target=lambda: second.record(is_tried.set))

    def while_another_tries():
        other.start()
        is_tried.wait(0.1)

    first.record(while_another_tries)
    other.join()
    assert is_tried.is_set()
    assert most == [1, 1]


def test_what_triton_lacks_to_start_a_kernel_is_told_before_anything_is_read(monkeypatch):
    class WithoutCompiler:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.\nSee elsewhere.")

    monkeypatch.setattr("bise.engine.device.require_device", lambda placement: None)
    monkeypatch.setattr("triton.runtime.driver", WithoutCompiler())
    with pytest.raises(
        ConfigError, match=r"here: Failed to find C compiler\.; it needs a C compiler"
    ) as caught:
        make_ops(Placement("cuda"))
    assert caught.value.field == "device"
    assert "\n" not in str(caught.value)
