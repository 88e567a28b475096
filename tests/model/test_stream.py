"""Weights one after the other: the same bytes as the whole model has, cached under the same name."""

import errno

import numpy as np
import pytest

from bise.hub.registry import resolve
from bise.kernels.cpu import CpuOps
from bise.model import packed as packed_module
from bise.model import stream as stream_module
from bise.model.checkpoint import open_model
from bise.model.packed import load_packed
from bise.model.packed_writer import PackedWriter
from bise.model.safetensors_file import SafetensorsFile
from bise.model.stream import stream_packed


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path))
    for module in (packed_module, stream_module):
        monkeypatch.setattr(module, "CACHE_MINIMUM_BYTES", 1)
    return tmp_path / "cache" / "packed"


def whole(source):
    packed = load_packed(source, "q4", CpuOps(1))[0]
    return {
        slot.name: packed.memory[slot.offset :][: slot.size_bytes].tobytes() for slot in packed.plan.slots
    }


def streamed(source):
    return {slot.name: panels.tobytes() for slot, panels in stream_packed(source, "q4", CpuOps(1))}


def test_a_stream_brings_and_caches_what_a_whole_load_does(home, monkeypatch):
    source = open_model(resolve(None))
    first = streamed(source)
    (path,) = home.iterdir()
    content = path.read_bytes()
    path.unlink()
    assert whole(source) == first
    assert path.read_bytes() == content

    def refuse(*_):
        raise AssertionError("packed again")

    monkeypatch.setattr(stream_module, "pack_tensor", refuse)
    assert streamed(source) == first


def test_what_a_damaged_cache_does_not_bring_is_made_and_the_next_stream_caches_it_anew(home):
    source = open_model(resolve(None))
    first = streamed(source)
    (path,) = home.iterdir()
    sound = path.read_bytes()
    norm = SafetensorsFile(path).entries["layers.1.attn_norm"]
    at = 8 + int.from_bytes(sound[:8], "little") + norm.start
    path.write_bytes(sound[:at] + np.float32(np.nan).tobytes() + sound[at + 4 :])
    assert streamed(source) == first
    assert not path.exists()
    assert streamed(source) == first
    assert path.read_bytes() == sound


def test_a_stream_left_half_way_leaves_no_file(home):
    stream = stream_packed(open_model(resolve(None)), "q4", CpuOps(1))
    next(stream)
    stream.close()
    assert list(home.iterdir()) == []


def test_a_full_disk_costs_the_cache_and_nothing_else(home, monkeypatch):
    source = open_model(resolve(None))
    write = PackedWriter.write
    calls = []

    def full(self, panels):
        calls.append(len(panels))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, panels)

    monkeypatch.setattr(PackedWriter, "write", full)
    found = streamed(source)
    assert list(home.iterdir()) == []
    assert len(calls) == 4
    monkeypatch.undo()
    assert found == whole(source)
