"""The server's secret: keys are stored as hashes that depend on it, so the database alone is of no use."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from bise.config import state_directory
from bise.errors import StoreError

SECRET_BYTES = 32


def load_secret(path: Path | None = None) -> bytes:
    """Return the secret in `path` (BISE_HOME/secret by default), which is made on first use with mode 600.

    Raises StoreError when others may read the file or when it does not hold a secret.
    """
    path = state_directory() / "secret" if path is None else path
    try:
        if not path.exists():
            _create(path)
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: the server's secret cannot be read or made: {error}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StoreError(f"{path}: others may read the server's secret: chmod 600 {path}")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise StoreError(f"{path}: does not hold a secret of {SECRET_BYTES} bytes in hex; restore it")
    return secret


def keyed_hash(secret: bytes, purpose: str, value: str) -> bytes:
    """Return HMAC-SHA256 of a value; different purposes never give the same hash."""
    return hmac.new(secret, f"{purpose}\0{value}".encode(), hashlib.sha256).digest()


def _create(path: Path) -> None:
    """Write a new secret whole or not at all; of two processes that try, one wins and both go on."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(SECRET_BYTES) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a file's name in its directory last: without this a power cut may lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
