"""Reading rows of safetensors files: values, ranges, row order, files that change."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bise.errors import ModelFileError
from bise.model.safetensors_file import SafetensorsFile, StoredTensor

save_file = pytest.importorskip("safetensors.numpy").save_file


def open_with(path: Path, **tensors: np.ndarray) -> SafetensorsFile:
    save_file(tensors, path)
    return SafetensorsFile(path)


def test_float32_and_float16_rows_are_read_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.float16):
        values = rng.standard_normal((7, 5)).astype(dtype)
        file = open_with(tmp_path / f"{dtype.__name__}.safetensors", other=np.zeros(3, np.float32), w=values)
        tensor = StoredTensor(file, file.entries["w"], (7, 5))
        assert np.array_equal(tensor.floats(0, 7), values.astype(np.float32))
        assert np.array_equal(tensor.floats(2, 5), values[2:5].astype(np.float32))
        assert tensor.raw(2, 5).tobytes() == values[2:5].tobytes()
        assert tensor.floats(3, 3).shape == (0, 5)


def test_bfloat16_rows_equal_those_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(256, 256)
    save_torch({"w": bits.view(torch.bfloat16)}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    tensor = StoredTensor(file, file.entries["w"], (256, 256))
    expected = bits.view(torch.bfloat16).float().numpy()
    assert tensor.floats(0, 256).view(np.uint32).tolist() == expected.view(np.uint32).tolist()
    assert (tensor.format, tensor.size_bytes) == ("BF16", 131072)


def test_a_vector_is_read_element_by_element(tmp_path: Path) -> None:
    file = open_with(tmp_path / "v.safetensors", v=np.arange(9, dtype=np.float32))
    tensor = StoredTensor(file, file.entries["v"], (9,))
    assert tensor.floats(2, 5).tolist() == [2.0, 3.0, 4.0]
    assert tensor.raw(2, 5).shape == (3, 4)


def test_rotary_pairs_are_returned_as_halves_as_in_the_docstring(tmp_path: Path) -> None:
    file = open_with(tmp_path / "q.safetensors", q=np.arange(8, dtype=np.float32).reshape(8, 1))
    tensor = StoredTensor(file, file.entries["q"], (8, 1), pair_width=4)
    assert tensor.floats(0, 8)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("width", [2, 6, 8])
def test_every_range_of_permuted_rows_equals_a_slice_of_the_whole(tmp_path: Path, width: int) -> None:
    values = np.random.default_rng(2).standard_normal((24, 3)).astype(np.float32)
    file = open_with(tmp_path / "q.safetensors", q=values)
    tensor = StoredTensor(file, file.entries["q"], (24, 3), pair_width=width)
    whole = values.reshape(-1, width // 2, 2, 3).transpose(0, 2, 1, 3).reshape(24, 3)
    for start in range(25):
        for stop in range(start, 25):
            assert np.array_equal(tensor.floats(start, stop), whole[start:stop])


def test_a_part_of_a_stacked_tensor_starts_at_its_own_row(tmp_path: Path) -> None:
    values = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    file = open_with(tmp_path / "e.safetensors", e=values)
    tensor = StoredTensor(file, file.entries["e"], (4, 2), first_row=4)
    assert np.array_equal(tensor.floats(1, 3), values[1, 1:3])


def test_a_file_cut_after_opening_gives_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    file = open_with(path, w=np.ones((100, 100), np.float32))
    tensor = StoredTensor(file, file.entries["w"], (100, 100))
    os.truncate(path, 20_000)
    assert tensor.floats(0, 10).all()
    with pytest.raises(ModelFileError, match=r"w\.safetensors ends at byte 20000"):
        tensor.floats(0, 100)


def test_a_file_deleted_after_opening_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    file = open_with(path, w=np.ones((4, 4), np.float32))
    path.unlink()
    assert StoredTensor(file, file.entries["w"], (4, 4)).floats(0, 4).all()


def test_a_closed_file_refuses_to_read(tmp_path: Path) -> None:
    file = open_with(tmp_path / "w.safetensors", w=np.ones((4, 4), np.float32))
    file.close()
    with pytest.raises(ModelFileError, match="closed"):
        StoredTensor(file, file.entries["w"], (4, 4)).floats(0, 4)


def test_reading_rows_allocates_those_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    file = open_with(path, w=np.zeros((4096, 1024), np.float32))
    tensor = StoredTensor(file, file.entries["w"], (4096, 1024))
    tracemalloc.start()
    for start in range(0, 4096, 64):
        tensor.floats(start, start + 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 64 * 1024 * 4
