"""Promises D6 to D8: full disks, pulls at the same time, damage found later."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
from pathlib import Path

import pytest
from stub_hub import assert_whole, fetch, installed

from bise.errors import BiseError, UserError
from bise.hub import pull as pull_module
from bise.hub.checksums import damaged_in
from bise.hub.client import HubClient
from bise.hub.installed import remove, verify
from bise.hub.pull import pull
from bise.hub.registry import local_models

SHARD = "model-00001-of-00002.safetensors"
REPO = "owner/tiny"


@pytest.fixture(autouse=True)
def _home(home):
    return home


# D6


class FullDisk:
    """Lets n calls pass that write or make something, then says that the disk is full."""

    def __init__(self, monkeypatch, n):
        self.left = n
        for name in ("write", "fsync", "link"):
            monkeypatch.setattr(pull_module.os, name, self.failing(getattr(os, name)))

    def failing(self, real):
        def call(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call


def test_d6_a_full_disk_at_any_write_is_one_line_and_leaves_nothing_final(stub, home):
    hub = stub.StubHub(stub.model_files(40_000))
    failures = 0
    try:
        for n in range(200):
            with pytest.MonkeyPatch.context() as patch:
                FullDisk(patch, n)
                try:
                    fetch(hub)
                    break
                except UserError as error:
                    assert "is full" in str(error) and "\n" not in str(error)  # noqa: PT017, PT018
                    failures += 1
                    if installed(home) is not None:  # only the names' own sync was left
                        assert damaged_in(home / "models" / "tiny") == []
                        break
            remove("tiny")
        assert failures > 15
        fetch(hub)
        files = installed(home)
        assert {name: files[name] for name in hub.files} == hub.files
    finally:
        hub.close()


def test_d6_too_little_room_is_told_before_anything_is_fetched(hub, home, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="is full"):
        fetch(hub)
    assert len(hub.seen) == 1


# D7


def _pull_in_process(url, home, outcomes):
    os.environ["BISE_HOME"] = home
    try:
        with HubClient(url) as client:
            pulled = pull(client, REPO, "main", "tiny", accept=lambda listing, size: None)
        outcomes.put("fetched" if pulled.fetched else "there")
    except BiseError as error:
        outcomes.put(str(error))


def test_d7_eight_pulls_at_once_end_with_one_good_copy(hub, home):
    context = multiprocessing.get_context("fork")
    outcomes = context.Queue()
    workers = [
        context.Process(target=_pull_in_process, args=(hub.url, str(home), outcomes)) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    results = sorted(outcomes.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert results == ["fetched", *["there"] * 7]
    assert len(hub.requests_for(SHARD)) == 1
    assert_whole(hub, home)


def test_a_name_that_another_model_has_is_refused(hub, home):
    (home / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="is there already"):
        fetch(hub)


# D8


def test_d8_verify_finds_every_flipped_byte(hub, home):
    fetch(hub)
    folder = home / "models" / "tiny"
    files = sorted(folder.iterdir())
    rng = random.Random(3)
    for turn in range(100):
        path = files[turn % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        assert verify("tiny"), (path.name, place)
        path.write_bytes(whole)
    assert verify("tiny") == []


def test_d8_verify_names_what_is_missing_and_what_is_new(hub, home):
    fetch(hub)
    folder = home / "models" / "tiny"
    (folder / "config.json").unlink()
    (folder / "evil.py").write_text("")
    assert verify(REPO) == ["config.json", "evil.py"]


def test_what_was_removed_is_gone_and_can_be_pulled_again(hub, home):
    fetch(hub)
    remove(REPO)
    assert local_models() == []
    with pytest.raises(UserError, match="there is no model"):
        remove("tiny")
    with pytest.raises(UserError, match="part of bise"):
        remove("brise")
    assert fetch(hub).fetched


def test_a_link_is_removed_without_what_it_leads_to(home, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (home / "models").mkdir(parents=True)
    (home / "models" / "linked").symlink_to(kept)
    remove("linked")
    assert kept.is_dir()
    assert not Path(home / "models" / "linked").is_symlink()
