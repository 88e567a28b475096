"""Pulling a model from a hub: every file whole and checked, or no model under that name at all.

Files arrive in BISE_HOME/models/.pulling/NAME; when the size and the hash of each are right, the whole folder
is renamed to BISE_HOME/models/NAME in one step. A pull that was stopped, however hard, goes on where it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bise.config import state_directory
from bise.errors import HubError, UserError
from bise.hub.checksums import CHECKSUMS, listing_of
from bise.hub.client import BrokenOffError, HubClient, HubFile, Listing, Progress
from bise.hub.file_names import is_local_name, needed_files

if TYPE_CHECKING:
    from bise.hub.client import Body

ORIGIN = "pulled.json"
"""Where a pulled model's files come from; written beside them."""
STAGING = ".pulling"
MAX_TRIES = 6
"""Transfers in a row that bring nothing new before a pull gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A model that is on this machine now."""

    path: Path
    commit: str
    fetched: bool
    """False when it was there already."""


def no_progress(what: str, fraction: float) -> None:
    """Show nothing."""


def pull(
    client: HubClient,
    repo: str,
    revision: str,
    name: str,
    *,
    accept: Callable[[Listing, int], None],
    progress: Progress = no_progress,
    pause: Callable[[float], None] = time.sleep,
) -> Pulled:
    """Bring a repository's model under `models/NAME`, or finish a pull that was stopped.

    `accept(listing, bytes)` raises when the user does not take the licence; nothing is fetched before. A
    second pull of the same name waits for the first. Raises HubError, UserError (the disk is full, the name
    is taken by another model).
    """
    if not is_local_name(name):
        raise UserError(f"'{name}' cannot be the name of a model here; choose another with --name")
    target = state_directory("models") / name
    staging = state_directory("models", STAGING) / name
    with _locked(staging.with_name(f"{name}.lock"), progress):
        listing = client.listing(repo, revision)
        if os.path.lexists(target):
            _require_same(target, listing, name)
            return Pulled(path=target, commit=listing.commit, fetched=False)
        files = [listing.files[file] for file in needed_files(list(listing.files))]
        for file in files:
            if file.sha256 is None and file.git_sha1 is None:
                raise HubError(f"the hub gives no hash of {file.name}; nothing was pulled")
        total = sum(file.size for file in files)
        accept(listing, total)
        with _disk(staging):
            _begin(staging, listing)
            _require_room(staging, total)
            sums = _fetch_all(client, listing, files, staging, total, progress, pause)
            _finish(client, listing, sums, staging, target)
    return Pulled(path=target, commit=listing.commit, fetched=True)


def _require_same(target: Path, listing: Listing, name: str) -> None:
    try:
        origin = json.loads((target / ORIGIN).read_bytes())
        is_same = origin["repo"] == listing.repo and origin["commit"] == listing.commit
    except (OSError, ValueError, TypeError, KeyError):
        is_same = False
    if not is_same:
        raise UserError(
            f"{target} is there already and is not {listing.repo} at {listing.commit[:12]}: "
            f"`bise models rm {name}` removes it, --name gives the new one another name"
        )


def _begin(staging: Path, listing: Listing) -> None:
    """Make the folder; throw away what another commit left in it."""
    mark = staging / ORIGIN
    wanted = {"repo": listing.repo, "commit": listing.commit}
    if staging.is_dir() and not staging.is_symlink():
        try:
            if json.loads(mark.read_bytes()) == wanted:
                return
        except (OSError, ValueError):
            pass  # a pull that was killed before it had begun
        shutil.rmtree(staging)
    staging.mkdir(mode=0o700)
    _write_whole(mark, json.dumps(wanted).encode())


def _require_room(staging: Path, total: int) -> None:
    have = sum(entry.stat().st_size for entry in staging.iterdir())
    free = shutil.disk_usage(staging).free
    if total - have > free:
        raise OSError(errno.ENOSPC, f"{total - have} bytes are to come and {free} are free", str(staging))


def _fetch_all(
    client: HubClient, listing: Listing, files: list[HubFile], staging: Path, total: int,
    progress: Progress, pause: Callable[[float], None],
) -> dict[str, str]:  # fmt: skip
    """Fetch what is missing; return the SHA-256 of every file."""
    sums: dict[str, str] = {}
    before = 0
    for file in files:

        def tell(done: int, file: HubFile = file, before: int = before) -> None:
            progress(file.name, (before + done) / max(total, 1))

        sums[file.name] = _fetch(client, listing, file, staging, tell, pause)
        before += file.size
    return sums


def _fetch(
    client: HubClient, listing: Listing, file: HubFile, staging: Path,
    tell: Callable[[int], None], pause: Callable[[float], None],
) -> str:  # fmt: skip
    """Bring one file into the staging folder, checked; return its SHA-256."""
    final, part = staging / file.name, staging / f"{file.name}.part"
    if final.is_file():
        return _Sums.of(final, file).check(file)
    tries = 0
    while True:
        sums = _Sums.of(part, file) if part.is_file() else _Sums(file)
        if sums.size > file.size:
            part.unlink()
            continue
        start = sums.size
        try:
            if start < file.size or not part.is_file():
                _receive(client, listing, file, part, sums, tell)
            if sums.size < file.size:
                raise BrokenOffError(f"{file.name}: ended after {sums.size} of {file.size} bytes")
        except BrokenOffError:
            tries = 0 if sums.size > start else tries + 1
            if tries >= MAX_TRIES:
                raise
            pause(min(2.0**tries, 30.0))
            continue
        try:
            digest = sums.check(file)
        except HubError:
            part.unlink()
            if start == 0:  # else the beginning may be of another time: once more from 0
                raise
            continue
        part.rename(final)
        return digest


def _receive(
    client: HubClient, listing: Listing, file: HubFile, part: Path, sums: _Sums, tell: Callable[[int], None]
) -> None:
    mark = part.with_name(f"{part.name}.etag")
    etag = mark.read_text(encoding="ascii") if sums.size and mark.is_file() else None
    with client.open(listing.repo, listing.commit, file, sums.size, etag) as body:
        if body.start == 0:
            sums.restart(file)
        _remember(mark, body)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if body.start else os.O_TRUNC)
        descriptor = os.open(part, flags, 0o600)
        try:
            os.lseek(descriptor, body.start, os.SEEK_SET)
            for chunk in body.chunks:
                _write(descriptor, chunk)
                sums.update(chunk)
                tell(sums.size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remember(mark: Path, body: Body) -> None:
    if body.etag is not None and body.etag.isascii():
        _write_whole(mark, body.etag.encode())
    else:
        mark.unlink(missing_ok=True)


class _Sums:
    """The hashes of what has arrived of a file."""

    def __init__(self, file: HubFile) -> None:
        self.restart(file)

    def restart(self, file: HubFile) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        # Git's own way of naming a file; all that hubs tell of small ones.
        self._sha1 = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    @classmethod
    def of(cls, path: Path, file: HubFile) -> _Sums:
        sums = cls(file)
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                sums.update(chunk)
        return sums

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._sha256.update(chunk)
        self._sha1.update(chunk)

    def check(self, file: HubFile) -> str:
        """Return the SHA-256. Raises HubError when it or the size is not what the hub listed."""
        digest = self._sha256.hexdigest()
        is_right = digest == file.sha256 if file.sha256 else self._sha1.hexdigest() == file.git_sha1
        if self.size != file.size or not is_right:
            raise HubError(f"{file.name}: what the hub sent is not what it listed; nothing was installed")
        return digest


def _finish(client: HubClient, listing: Listing, sums: dict[str, str], staging: Path, target: Path) -> None:
    """Write where the files come from and their hashes, then give the folder its name in one step."""
    origin = {"hub": client.url, "repo": listing.repo, "commit": listing.commit, "licence": listing.licence}
    data = (json.dumps(origin, indent=1) + "\n").encode()
    # The mark of the staging folder stays as it is until all is there: a pull killed here just goes on.
    finished = staging.with_name(f"{staging.name}.done")
    if finished.exists():
        shutil.rmtree(finished)
    finished.mkdir(mode=0o700)
    for name in sums:
        os.link(staging / name, finished / name)
    _write_whole(finished / ORIGIN, data)
    listed = listing_of(sums | {ORIGIN: hashlib.sha256(data).hexdigest()})
    _write_whole(finished / CHECKSUMS, listed.encode())
    _sync(finished)
    finished.rename(target)
    _sync(target.parent)
    shutil.rmtree(staging)


def _write_whole(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk(staging: Path) -> Generator[None]:
    """Turn what a disk refuses into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {staging.parent} is full; what has arrived is kept: make room and pull again"
            ) from error
        raise UserError(f"{staging}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(path: Path, progress: Progress) -> Generator[None]:
    """Hold the lock of a name; the system lets it go whatever becomes of this process."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another pull of this model runs; waiting", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
