import errno
import os

import pytest

from bise.errors import NotFoundError, RequestError, StoreError
from bise.store.files import Files


@pytest.fixture
def files(database, tmp_path, clock):
    folder = tmp_path / "files"
    folder.mkdir()
    return Files(database, folder, clock, max_bytes=1000)


def _names(tmp_path):
    return sorted(path.name for path in (tmp_path / "files").iterdir())


def test_a_file_comes_back_byte_for_byte(files, tmp_path):
    stored = files.create("ann", "a.jsonl", "batch", [b"one\ntw", b"o\nthree"])
    assert b"".join(files.read("ann", stored.id)) == b"one\ntwo\nthree"
    assert (stored.size_bytes, stored.num_lines) == (13, 3)
    assert files.is_whole("ann", stored.id)
    assert _names(tmp_path) == [stored.id]


@pytest.mark.parametrize("action", ["get", "read", "delete", "is_whole"])
def test_the_file_of_someone_else_does_not_exist(files, action):
    stored = files.create("ann", "a", "batch", [b"x"])
    with pytest.raises(NotFoundError):
        getattr(files, action)("bob", stored.id)
    assert files.list("bob") == ([], 0)
    assert files.get("ann", stored.id) == stored


@pytest.mark.parametrize("file_id", ["", "../secret", "x" * 1000, "' OR 1=1 --", "\0"])
def test_an_id_that_is_none_is_not_found(files, file_id):
    with pytest.raises(NotFoundError):
        files.get("ann", file_id)


def test_a_file_that_is_too_large_leaves_nothing(files, tmp_path):
    with pytest.raises(RequestError, match="larger than 1000 bytes"):
        files.create("ann", "a", "batch", [b"x" * 600, b"x" * 600])
    assert _names(tmp_path) == []
    assert files.list("ann") == ([], 0)


def test_an_upload_that_breaks_off_leaves_nothing(files, tmp_path):
    def broken():
        yield b"x"
        raise ValueError

    with pytest.raises(ValueError):
        files.create("ann", "a", "batch", broken())
    assert _names(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_nothing(files, tmp_path, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreError, match="No space left on device"):
            files.create("ann", "a", "batch", [b"x"])
    assert _names(tmp_path) == []
    files.create("ann", "a", "batch", [b"x"])


@pytest.mark.parametrize(
    ("name", "purpose"), [("", "batch"), ("a\nb", "batch"), ("x" * 256, "batch"), ("a", "ocr")]
)
def test_a_bad_name_or_purpose_is_refused(files, name, purpose):
    with pytest.raises(RequestError):
        files.create("ann", name, purpose, [b"x"])


def test_a_hostile_name_is_data(files, tmp_path):
    stored = files.create("ann", "../../etc/passwd", "batch", [b"x"])
    assert files.get("ann", stored.id).name == "../../etc/passwd"
    assert _names(tmp_path) == [stored.id]


def test_a_deleted_file_is_gone_from_the_disk(files, tmp_path):
    stored = files.create("ann", "a", "batch", [b"x"])
    files.delete("ann", stored.id)
    assert _names(tmp_path) == []
    with pytest.raises(NotFoundError):
        files.get("ann", stored.id)


def test_a_changed_content_is_noticed(files, tmp_path):
    stored = files.create("ann", "a", "batch", [b"abc"])
    (tmp_path / "files" / stored.id).write_bytes(b"abd")
    assert not files.is_whole("ann", stored.id)
    (tmp_path / "files" / stored.id).write_bytes(b"ab")
    with pytest.raises(StoreError, match="changed on disk"):
        list(files.read("ann", stored.id))


def test_a_file_expires(files, clock):
    stored = files.create("ann", "a", "batch", [b"x"], expires_after_s=60)
    clock.pass_(59)
    files.get("ann", stored.id)
    clock.pass_(1)
    with pytest.raises(NotFoundError):
        files.get("ann", stored.id)


def test_the_next_upload_removes_what_expired_from_the_disk(files, clock, tmp_path):
    files.create("ann", "a", "batch", [b"x"], expires_after_s=60)
    clock.pass_(60)
    later = files.create("ben", "b", "batch", [b"y"])
    assert _names(tmp_path) == [later.id]


def test_the_next_start_removes_what_expired_from_the_disk(files, database, clock, tmp_path):
    files.create("ann", "a", "batch", [b"x"], expires_after_s=60)
    clock.pass_(60)
    Files(database, tmp_path / "files", clock)
    assert _names(tmp_path) == []


def test_files_are_listed_in_pages(files, clock):
    ids = []
    for number in range(5):
        clock.pass_(1)
        purpose = "fine-tune" if number == 2 else "batch"
        ids.insert(0, files.create("ann", f"f{number}%", purpose, [b"x"]).id)
    page, total = files.list("ann", limit=2)
    assert ([file.id for file in page], total) == (ids[:2], 5)
    assert [file.id for file in files.list("ann", after=ids[1], limit=2)[0]] == ids[2:4]
    assert [file.id for file in files.list("ann", offset=3)[0]] == ids[3:]
    assert [file.id for file in files.list("ann", newest_first=False)[0]] == ids[::-1]
    assert [file.id for file in files.list("ann", after=ids[1], newest_first=False)[0]] == ids[:1]
    assert [file.id for file in files.list("ann", purpose="fine-tune")[0]] == [ids[2]]
    assert [file.id for file in files.list("ann", search="3%")[0]] == [ids[1]]
    with pytest.raises(NotFoundError):
        files.list("bob", after=ids[1])


def test_what_a_killed_upload_left_is_cleared_once_it_is_old(files, database, tmp_path, clock):
    kept = files.create("ann", "a", "batch", [b"x"])
    for name, age in (("old.tmp", 7200), ("new.tmp", 0)):
        path = tmp_path / "files" / name
        path.write_bytes(b"x")
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    os.utime(tmp_path / "files" / kept.id, (0, 0))
    Files(database, tmp_path / "files", clock)
    assert _names(tmp_path) == sorted([kept.id, "new.tmp"])
