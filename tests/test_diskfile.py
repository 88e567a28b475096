"""Opening files of strangers: regular ones only, inside the directory only, within limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bise.diskfile import open_regular, read_at, read_bounded, read_prefix, resolve_inside
from bise.errors import ModelFileError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(b"0123456789")
    return path


def test_a_file_within_the_limit_is_read_whole(file: Path) -> None:
    assert read_bounded(file, 10) == b"0123456789"


def test_a_file_over_the_limit_is_refused_with_its_size(file: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json has 10 bytes; at most 9"):
        read_bounded(file, 9)


def test_a_prefix_is_read_of_a_longer_file(file: Path) -> None:
    assert read_prefix(file, 4) == b"0123"
    assert read_prefix(file, 99) == b"0123456789"


def test_reading_past_the_end_is_an_error_and_not_a_short_read(file: Path) -> None:
    descriptor, size = open_regular(file)
    try:
        assert size == 10
        assert read_at(descriptor, file, 7, 3) == b"789"
        with pytest.raises(ModelFileError, match="ends at byte 10, 2 bytes early"):
            read_at(descriptor, file, 8, 4)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "loop", "device", "nul", "long"])
def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to("x")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "nul":
        path = tmp_path / "a\0b"
    elif kind == "long":
        path = tmp_path / ("a" * 5000)
    with pytest.raises(ModelFileError) as caught:
        open_regular(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc/passwd", "..\\x", "a\0", "c:x", "../config.json"]
)
def test_only_plain_names_are_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match="not a plain file name"):
        resolve_inside(tmp_path, name)


def test_a_link_inside_the_directory_is_followed(file: Path) -> None:
    (file.parent / "link").symlink_to("config.json")
    assert resolve_inside(file.parent, "link") == file.resolve()


@pytest.mark.parametrize("target", ["../secret", "sub/inner", "../folder/../secret"])
def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "inner").write_text("x")
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(target)
    with pytest.raises(ModelFileError, match="leads outside"):
        resolve_inside(folder, "link")


def test_only_the_blobs_of_the_same_hub_cache_are_inside(tmp_path: Path) -> None:
    for owner in ("ours", "theirs"):
        (tmp_path / owner / "snapshots" / "1").mkdir(parents=True)
        (tmp_path / owner / "blobs").mkdir()
        (tmp_path / owner / "blobs" / "ab").write_text("x")
    snapshot = tmp_path / "ours" / "snapshots" / "1"
    (snapshot / "good").symlink_to("../../blobs/ab")
    (snapshot / "bad").symlink_to("../../../theirs/blobs/ab")
    assert resolve_inside(snapshot, "good").read_text() == "x"
    with pytest.raises(ModelFileError, match="leads outside"):
        resolve_inside(snapshot, "bad")


def test_opening_a_refused_file_leaks_no_descriptor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with pytest.raises(ModelFileError):
            open_regular(tmp_path / "x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
