"""Backups: taken under load they restore to one state; what is not sound or would destroy is refused."""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
import threading
from contextlib import closing

import pytest

from bise.cli.app import run
from bise.errors import UserError
from bise.store.backup import MANIFEST, read_backup, restore_backup, write_backup
from bise.store.ledger import LedgerRow
from bise.store.opening import Store


def open_store(home):
    (home / "files").mkdir(parents=True, exist_ok=True)
    return Store.open(str(home / "bise.db"), folder=home / "files", secret=home / "secret")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def write_on(store, stop):
    """Make a key, a row and a file again and again; delete every other file."""
    number = 0
    while not stop.is_set():
        info, _ = store.keys.create(f"k{number}")
        store.ledger.record(
            LedgerRow(request_id=str(number), key_id=info.id, owner=info.owner, endpoint="e", model="m")
        )
        made = store.files.create(info.owner, "a.jsonl", "batch", [b"x" * 1000, str(number).encode()])
        if number % 2:
            store.files.delete(info.owner, made.id)
        number += 1


def check_state(home):
    """Every row has its key, every file that is entered is there whole; return the number of keys."""
    with closing(sqlite3.connect(home / "bise.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        orphans = "SELECT count(*) FROM ledger WHERE key_id NOT IN (SELECT id FROM keys)"
        assert database.execute(orphans).fetchone() == (0,)
    with open_store(home) as store:
        keys = store.keys.list()
        for key in keys:
            for file in store.files.list(key.owner, limit=10_000)[0]:
                assert len(b"".join(store.files.read(key.owner, file.id))) == file.size_bytes
        return len(keys)


def check_backups_under_load(home, tmp_path, count):
    with open_store(home) as store:
        stop = threading.Event()
        writers = [threading.Thread(target=write_on, args=(store, stop)) for _ in range(2)]
        for writer in writers:
            writer.start()
        sizes = []
        try:
            for number in range(count):
                known = len(store.keys.list())
                target = tmp_path / f"b{number}.tar"
                write_backup(store.database, store.files, home, target)
                sizes.append(known)
        finally:
            stop.set()
            for writer in writers:
                writer.join()
    for number, known in enumerate(sizes):
        restored = tmp_path / f"r{number}"
        restored.mkdir()
        restore_backup(tmp_path / f"b{number}.tar", restored)
        assert check_state(restored) >= known  # nothing that was acknowledged before it is missing
    assert not list(home.glob(".backup-*"))


def test_t7_backups_taken_under_load_restore_to_a_consistent_state(home, tmp_path):
    check_backups_under_load(home, tmp_path, 4)


@pytest.mark.slow
def test_t7_twenty_backups_under_load_restore_to_a_consistent_state(home, tmp_path):
    check_backups_under_load(home, tmp_path, 20)


@pytest.fixture
def saved(home, tmp_path):
    """A backup of one key and one file; (path, the key)."""
    with open_store(home) as store:
        info, key = store.keys.create("ann")
        store.files.create(info.owner, "a", "batch", [b"hello"])
        (home / "config.toml").write_text("[serve]\nport = 8001\n")
        write_backup(store.database, store.files, home, tmp_path / "b.tar")
    return tmp_path / "b.tar", key


def test_a_restored_key_opens_because_the_secret_came_with_it(saved, tmp_path):
    path, key = saved
    new = tmp_path / "new"
    new.mkdir()
    assert restore_backup(path, new).num_files == 1
    with open_store(new) as store:
        assert store.keys.verify(key).name == "ann"
    assert (new / "config.toml").read_text().startswith("[serve]")
    assert path.stat().st_mode & 0o077 == 0
    assert (new / "bise.db").stat().st_mode & 0o077 == 0


def test_any_flipped_byte_of_the_contents_is_found(saved, tmp_path):
    path, _ = saved
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        spots = [member.offset_data + member.size // 2 for member in archive if member.size]
    for spot in spots:
        path.write_bytes(data[:spot] + bytes([data[spot] ^ 4]) + data[spot + 1 :])
        with pytest.raises(UserError, match="no sound backup"):
            read_backup(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no sound backup"):
        read_backup(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "files/../../evil", "bise.service", "files/a.b"])
def test_a_member_with_a_name_of_its_own_choice_is_refused(name, saved, tmp_path):
    import io
    import json

    path, _ = saved
    with tarfile.open(path) as archive:
        manifest = json.loads(archive.extractfile(MANIFEST).read())
    manifest["members"] = {name: "0" * 64}
    forged = tmp_path / "forged.tar"
    with tarfile.open(forged, "w") as archive:
        for member, content in ((MANIFEST, json.dumps(manifest).encode()), (name, b"x")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    target = tmp_path / "t"
    target.mkdir()
    with pytest.raises(UserError, match="no sound backup"):
        restore_backup(forged, target)
    assert list(target.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked_and_kept_then(saved, home):
    path, _ = saved
    with pytest.raises(UserError, match="--replace"):
        restore_backup(path, home)
    with open_store(home) as store:
        store.keys.create("later")
    restore_backup(path, home, replace=True)
    with open_store(home) as store:
        assert [key.name for key in store.keys.list()] == ["ann"]
    (old,) = home.glob("before-restore-*")
    with open_store(old) as store:
        assert [key.name for key in store.keys.list()] == ["ann", "later"]


def test_a_database_in_use_is_not_taken_away(saved, home):
    path, _ = saved
    with open_store(home) as store:
        store.keys.create("now")
        with pytest.raises(UserError, match="a process uses it"):
            restore_backup(path, home, replace=True)
        store.keys.create("then")


def test_the_verb_saves_checks_and_restores(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BISE_HOME", str(home))
    assert run(["keys", "create", "--name", "ann"]) == 0
    target = str(tmp_path / "b.tar")
    assert run(["backup", "create", target]) == 0
    assert run(["backup", "create", target]) == 2  # never over an older one
    assert run(["backup", "verify", target]) == 0
    shutil.rmtree(home)
    assert run(["backup", "restore", target]) == 0
    capsys.readouterr()
    assert run(["keys", "list"]) == 0
    assert "ann" in capsys.readouterr().out
