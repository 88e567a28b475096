"""Opening files that strangers made: regular files only, inside the model's directory, up to a limit.

A FIFO, device or directory in place of a file is an error and never a hang; so is a symlink that leaves the
directory (the hub cache's links into its own `blobs` folder excepted). And names for files of our own that
appear whole or not at all.
"""

from __future__ import annotations

import glob
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from bise.errors import ModelFileError, quoted

_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading and return (file descriptor, size in bytes); the caller closes it.

    Raises `ModelFileError` when it is missing, unreadable, or anything but a regular file.
    """
    try:
        # Looked at before it is opened too: opening a device or the far end of a FIFO has effects of its own.
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise ModelFileError(
            f"{quoted(str(path))} is not a valid file name: {error}", field=str(path)
        ) from error
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status.st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the whole content of a regular file of at most `limit` bytes; a larger one is refused unread."""
    descriptor, size = open_regular(path)
    try:
        if size > limit:
            raise ModelFileError(
                f"{path} has {size} bytes; at most {limit} are accepted here", field=str(path)
            )
        return read_at(descriptor, path, 0, size)
    finally:
        os.close(descriptor)


def read_prefix(path: Path, limit: int) -> bytes:
    """Return the first `limit` bytes of a regular file, or all of a shorter one."""
    descriptor, size = open_regular(path)
    try:
        return read_at(descriptor, path, 0, min(size, limit))
    finally:
        os.close(descriptor)


def read_at(descriptor: int, path: Path, offset: int, length: int) -> bytes:
    """Return exactly `length` bytes from `offset`; a file cut while in use raises `ModelFileError`."""
    buffer = bytearray(length)
    read_into(descriptor, path, offset, memoryview(buffer))
    return bytes(buffer)


def read_into(descriptor: int, path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` (bytes, writable) from `offset` of an open file; see `read_at`."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if count == 0:
            raise ModelFileError(
                f"{path} ends at byte {offset + done}, {len(target) - done} bytes early: "
                "it was cut or replaced while in use; fetch it again",
                field=str(path),
            )
        done += count


def resolve_inside(directory: Path, name: str) -> Path:
    """Return the real path of the file `name` of a model directory; refuse anything that lies outside it.

    `name` is a plain file name. A symlink may lead to another file of the same directory or, in a hub cache
    (`snapshots/REVISION/name`), to that cache's own `blobs` folder; nowhere else.
    """
    shown = quoted(name)
    if not name or name in (".", "..") or any(char in name for char in "/\\\0:"):
        raise ModelFileError(
            f"{directory}: {shown} is not a plain file name inside the model directory", field=name
        )
    try:
        folder = directory.resolve(strict=True)
        real = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(directory / name, error) from error
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if real.parent not in allowed:
        raise ModelFileError(
            f"{directory / name} leads outside the model directory; replace the link by the file itself",
            field=name,
        )
    return real


def require_inside(directory: Path, names: Iterable[str]) -> None:
    """Refuse those of the files `names` that are in `directory` but lead out of it or nowhere."""
    for name in names:
        if os.path.lexists(directory / name):
            resolve_inside(directory, name)


def draft_of(path: Path) -> Path:
    """Return a name beside `path` that nobody else uses, for what is renamed to `path` once it is whole.

    Drafts that ended processes left are removed: each may be as large as what it was to become. Raises
    OSError.
    """
    for abandoned in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = abandoned.name.split(".")[-2]
        if not pid.isdecimal():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            abandoned.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue  # another user's process, alive; or no process id at all
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise ModelFileError(f"{path} is {kind}, not a regular file", field=str(path))


def _unreadable(path: Path, error: Exception) -> ModelFileError:
    if isinstance(error, FileNotFoundError):
        return ModelFileError(f"{quoted(str(path), 400)} does not exist", field=str(path))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelFileError(f"{quoted(str(path), 400)} cannot be read: {reason}", field=str(path))
