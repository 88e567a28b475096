"""Backups of what `bise serve` keeps, taken while it runs: one tar file, checked when it is restored.

The database is copied as it was at one moment, with every file that it knows of, the server's secret and the
configuration. Models, caches and adapters are not in it: they can be fetched or made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy import text

from bise import __version__
from bise.errors import ModelFileError, StoreError, UserError
from bise.jsonfile import parse_json
from bise.store.database import Database, first_line
from bise.store.files import Files
from bise.store.secret import sync_directory

MANIFEST = "manifest.json"
DATABASE = "bise.db"
SETTINGS = ("secret", "config.toml", "remotes.json")
"""Files of the home directory that are saved when they are there."""
FOLDER = "files"
_CHUNK = 1 << 20
_MAX_MANIFEST = 64 << 20
_TRIES = 10
"""A file that is made and deleted again while the backup begins makes it begin anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a backup holds."""

    version: str
    """Of the bise that took it."""
    revision: str
    """The database's schema; empty when the database is not in it."""
    taken_at: float
    members: dict[str, str]
    """SHA-256 by name."""

    @property
    def num_files(self) -> int:
        """Files that users handed in or jobs made."""
        return sum(name.startswith(f"{FOLDER}/") for name in self.members)


def write_backup(database: Database, files: Files, home: Path, target: Path) -> Manifest:
    """Write a backup to `target`, whole or not at all; its mode is 600. Any number of writers may go on.

    A PostgreSQL database is not in it: `pg_dump` saves that. Raises UserError when `target` exists,
    StoreError when something cannot be read or written.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; name another file", field=str(target))
    try:
        with _workplace(home) as place:
            for _ in range(_TRIES):
                if _gathered(database, files, place):
                    break
                shutil.rmtree(place / FOLDER)
            else:
                raise StoreError("files are deleted faster than they can be saved; try again")
            for name in SETTINGS:
                if (home / name).is_file():
                    shutil.copyfile(home / name, place / name)
            return _pack(place, target, _revision(database))
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{target}: the backup cannot be written: {_reason(error)}") from error


def read_backup(source: Path) -> Manifest:
    """Check every byte of a backup and return what it holds. Raises UserError when it is not sound."""
    with _opened(source) as archive:
        manifest = _manifest(archive, source)
        for _ in _contents(archive, manifest, source):
            pass
        return manifest


def restore_backup(source: Path, home: Path, *, replace: bool = False) -> Manifest:
    """Put everything of a backup under `home`, checked first. What was there is kept in a folder beside it.

    Raises UserError when the backup is not sound, when something would be replaced without `replace`, or
    while a process uses the database.
    """
    with _opened(source) as archive, _workplace(home) as place:
        manifest = _manifest(archive, source)
        for name, stream in _contents(archive, manifest, source):
            path = place / name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _write(path, stream)
        if DATABASE in manifest.members:
            _check_database(place / DATABASE, source)
        parts = (*SETTINGS, FOLDER, *([DATABASE] if DATABASE in manifest.members else []))
        there = [name for name in parts if (home / name).exists()]
        taken = [name for name in there if name != FOLDER or any((home / name).iterdir())]
        if taken and not replace:
            raise UserError(
                f"{home} has {', '.join(taken)} already: restore into another BISE_HOME, or say --replace; "
                "what is there is kept beside it",
                field=str(home),
            )
        if DATABASE in there:
            _check_unused(home / DATABASE)
        _put(place, home, there)
    return manifest


def _gathered(database: Database, files: Files, place: Path) -> bool:
    """Copy the database and the files that it knows of; False when one of them is gone already."""
    held = place / FOLDER
    held.mkdir(mode=0o700)
    for path in files.folder.iterdir():
        if not path.name.endswith(".tmp"):
            _link(path, held / path.name)
    if not database.is_sqlite:
        return True
    known = _copy_database(database, place / DATABASE)
    for name in known - {path.name for path in held.iterdir()}:
        if not _link(files.folder / name, held / name):
            return False
    for path in held.iterdir():
        if path.name not in known:
            path.unlink()
    return True


def _link(source: Path, target: Path) -> bool:
    """Hold on to a file that may be deleted; its content never changes. False when it is gone."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        return False
    except OSError:  # a file system without links
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            return False
    return True


def _copy_database(database: Database, target: Path) -> set[str]:
    """Copy the database as it is at one moment and return the ids of the files that it knows of."""
    path = database.engine.url.database or ""
    with (
        closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as source,
        closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
        verdict = copy.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            raise StoreError(f"{path}: the database is damaged ({first_line(Exception(verdict))})")
        known = {str(row[0]) for row in copy.execute("SELECT id FROM files")}
    target.chmod(0o600)
    return known


def _pack(place: Path, target: Path, revision: str) -> Manifest:
    draft = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            members = {path.relative_to(place).as_posix(): _digest(path) for path in paths}
            manifest = Manifest(
                version=__version__,
                revision=revision if DATABASE in members else "",
                taken_at=time.time(),
                members=members,
            )
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, MANIFEST, io.BytesIO(json.dumps(asdict(manifest), indent=1).encode()))
                for path in paths:
                    with path.open("rb") as content:
                        _add(archive, path.relative_to(place).as_posix(), content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(draft, target)  # never over something that came meanwhile
        sync_directory(target.parent)
    finally:
        draft.unlink(missing_ok=True)
    return manifest


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size = content.seek(0, os.SEEK_END)
    content.seek(0)
    info.mode = 0o600
    info.mtime = int(time.time())
    archive.addfile(info, content)


@contextmanager
def _opened(source: Path) -> Generator[tarfile.TarFile]:
    try:
        with tarfile.open(source, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise _unsound(source, _reason(error)) from error
    except OSError as error:
        raise UserError(f"{source}: {_reason(error)}", field=str(source)) from error


def _manifest(archive: tarfile.TarFile, source: Path) -> Manifest:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > _MAX_MANIFEST:
        raise _unsound(source, "it does not begin with a manifest")
    stream = archive.extractfile(first)
    assert stream is not None
    try:
        value = parse_json(stream.read(), MANIFEST, max_values=10_000_000)
        manifest = Manifest(**cast(dict[str, Any], value))
        members = cast(object, manifest.members)
        sound = isinstance(members, dict) and all(map(_is_name, cast(dict[object, object], members)))
    except (ModelFileError, TypeError, AttributeError) as error:
        raise _unsound(source, "its manifest cannot be read") from error
    if not sound:
        raise _unsound(source, "its manifest has a name that no backup has")
    return manifest


def _is_name(name: object) -> bool:
    """Return True for what a backup can hold: no path out of the home directory."""
    if not isinstance(name, str):
        return False
    folder, _, rest = name.partition("/")
    is_file = folder == FOLDER and rest.replace("-", "").isalnum() and rest.isascii()
    return name in (*SETTINGS, DATABASE) or is_file


def _contents(archive: tarfile.TarFile, manifest: Manifest, source: Path) -> Generator[tuple[str, IO[bytes]]]:
    """Yield each member; refuses what is missing, unknown, doubled or not what the manifest says of it."""
    left = dict(manifest.members)
    while (info := archive.next()) is not None:
        wanted = left.pop(info.name, None)
        if wanted is None or not info.isreg():
            raise _unsound(source, f"{ascii(info.name)[:80]} is not in its manifest")
        stream = archive.extractfile(info)
        assert stream is not None
        checked = _Checked(stream)
        yield info.name, cast(IO[bytes], checked)
        while checked.read(_CHUNK):
            pass
        if checked.digest.hexdigest() != wanted:
            raise _unsound(source, f"{info.name} is not what was saved")
    if left:
        raise _unsound(source, f"{min(left)} is missing")


class _Checked:
    """A stream that is hashed while it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def _write(path: Path, stream: IO[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as target:
        shutil.copyfileobj(stream, target, _CHUNK)
        target.flush()
        os.fsync(target.fileno())


def _check_database(path: Path, source: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as database:
            verdict = database.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        raise _unsound(source, _reason(error)) from error
    if verdict != "ok":
        raise _unsound(source, "its database is damaged")


def _check_unused(path: Path) -> None:
    """Refuse to take the database from under a running process."""
    with closing(sqlite3.connect(path, timeout=0.5)) as database:
        try:
            # Nobody can leave WAL mode while another process has the database open.
            mode = database.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if "locked" not in str(error):
                return  # damaged: all the more reason to restore
            mode = "wal"
    if mode == "wal":
        raise UserError(f"{path}: a process uses it; stop `bise serve` first", field=str(path))


def _put(place: Path, home: Path, there: list[str]) -> None:
    """Move what is there out of the way and the backup into its place; the database comes last."""
    if there:
        old = home / f"before-restore-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        old.mkdir(mode=0o700)
        for name in (*there, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            if (home / name).exists():
                (home / name).rename(old / name)
    for name in (*SETTINGS, FOLDER, DATABASE):
        if (place / name).exists():
            (place / name).rename(home / name)
    sync_directory(home)


@contextmanager
def _workplace(home: Path) -> Generator[Path]:
    """Give an empty folder on the home's file system that is gone afterwards."""
    place = home / f".backup-{secrets.token_hex(8)}"
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _revision(database: Database) -> str:
    with database.reading() as session:
        return str(session.execute(text("SELECT version_num FROM alembic_version")).scalar())


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unsound(source: Path, reason: str) -> UserError:
    return UserError(f"{source}: is no sound backup: {reason}", field=str(source))


def _reason(error: Exception) -> str:
    return (
        error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    ) or "broken"
