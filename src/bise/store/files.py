"""Files that users hand in and that jobs make: content on disk under BISE_HOME, facts in the database.

A file is there whole or not at all: its content is written under another name, brought to the disk, renamed,
and only then entered in the database. Names that users give are data; on disk a file bears its id.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, delete, false, func, or_, select
from sqlalchemy.orm import Session

from bise.config import state_directory
from bise.errors import NotFoundError, RequestError, StoreError
from bise.store.database import Database, is_sound_id
from bise.store.schema import FileRecord
from bise.store.secret import sync_directory

PURPOSES = ("batch", "fine-tune", "user_data")
"""What users may hand in; `batch_output` is what batch jobs make."""
OUTPUT = "batch_output"
RESULTS = "fine-tune-results"
"""What fine-tuning jobs make."""
ERROR_ENDING = "_error.jsonl"
"""How the names of batch outputs end that hold errors."""
SAMPLE_TYPES = ("pretrain", "instruct", "batch_request", "batch_result", "batch_error")
MAX_FILE_BYTES = 512 << 20
MAX_NAME = 255
CHUNK_BYTES = 1 << 20
ORPHAN_S = 3600.0
"""Content without an entry in the database is a killed upload's once it is this old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file."""

    id: str
    owner: str
    name: str
    purpose: str
    source: str
    """`upload` or `bise`."""
    size_bytes: int
    sha256: str
    num_lines: int | None
    created_at: float
    expires_at: float | None

    @property
    def sample_type(self) -> str:
        """What its lines are, one of SAMPLE_TYPES; `_sample_condition` says the same to the database."""
        if self.purpose == "batch":
            return "batch_request"
        if self.purpose == OUTPUT:
            return "batch_error" if self.name.endswith(ERROR_ENDING) else "batch_result"
        return "instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Bytes that are on disk under an id, but not in the database yet."""

    id: str
    size_bytes: int
    sha256: str
    num_lines: int


class Files:
    """The files of one database; `folder` holds their contents."""

    def __init__(
        self,
        database: Database,
        folder: Path | None = None,
        clock: Callable[[], float] = time.time,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Take a folder of our own (BISE_HOME/files by default); remove the files whose time is over and what
        killed uploads left in it.
        """
        self._database = database
        self.folder = state_directory("files") if folder is None else folder
        """Where contents lie, each under its id."""
        self._clock = clock
        self.max_bytes = max_bytes
        self._remove_expired()
        self._sweep()

    def create(
        self,
        owner: str,
        name: str,
        purpose: str,
        chunks: Iterable[bytes],
        *,
        expires_after_s: float | None = None,
    ) -> StoredFile:
        """Store a file that a user hands in, and remove those whose time is over.

        RequestError for a bad name or purpose or too many bytes.
        """
        if purpose not in PURPOSES:
            raise RequestError(
                f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}", field="purpose"
            )
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise RequestError(
                f"the file's name must have 1 to {MAX_NAME} printable characters", field="file"
            )
        self._remove_expired()
        content = self.write(chunks)
        try:
            with self._database.writing() as session:
                return self.enter(session, owner, name, purpose, content, expires_after_s=expires_after_s)
        except BaseException:
            self.discard(content)
            raise

    def write(self, chunks: Iterable[bytes]) -> Content:
        """Bring bytes to the disk under a new id; `enter` or `discard` must follow.

        RequestError when there are more than `max_bytes`, StoreError when the disk does not take them.
        """
        file_id = str(uuid.uuid4())
        draft = self.folder / f"{file_id}.tmp"
        digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                for chunk in chunks:
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise RequestError(f"the file is larger than {self.max_bytes} bytes", field="file")
                    digest.update(chunk)
                    lines += chunk.count(b"\n")
                    last = chunk[-1:] or last
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            draft.rename(self._path(file_id))
            sync_directory(self.folder)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise StoreError(f"the file cannot be stored: {error.strerror or error}") from error
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return Content(
            id=file_id, size_bytes=size, sha256=digest.hexdigest(), num_lines=lines + (last != b"\n")
        )

    def enter(
        self,
        session: Session,
        owner: str,
        name: str,
        purpose: str,
        content: Content,
        *,
        source: str = "upload",
        expires_after_s: float | None = None,
    ) -> StoredFile:
        """Make content that is on disk a file, inside the caller's transaction."""
        now = self._clock()
        record = FileRecord(
            id=content.id,
            owner=owner,
            name=name,
            purpose=purpose,
            source=source,
            size_bytes=content.size_bytes,
            sha256=content.sha256,
            num_lines=content.num_lines,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
        )
        session.add(record)
        session.flush()
        return _file(record)

    def discard(self, content: Content) -> None:
        """Remove content that did not become a file."""
        self._path(content.id).unlink(missing_ok=True)

    def get(self, owner: str, file_id: str) -> StoredFile:
        """Return one of the owner's files; NotFoundError when there is none, or it is someone else's."""
        with self._database.reading() as session:
            return _file(self._find(session, owner, file_id))

    def list(
        self,
        owner: str,
        *,
        purpose: str | None = None,
        search: str | None = None,
        sample_types: Sequence[str] = (),
        sources: Sequence[str] = (),
        after: str | None = None,
        offset: int = 0,
        limit: int = 100,
        newest_first: bool = True,
    ) -> tuple[list[StoredFile], int]:
        """Return a page of the owner's files, and how many there are in all.

        `sample_types` and `sources` narrow to some of them; empty means all. `after` is the id that the page
        before ended with; NotFoundError when it is none of the owner's.
        """
        query = select(FileRecord).where(FileRecord.owner == owner, self._is_alive())
        if purpose is not None:
            query = query.where(FileRecord.purpose == purpose)
        if search:
            query = query.where(FileRecord.name.contains(search, autoescape=True))
        if sample_types:
            query = query.where(or_(*(_sample_condition(name) for name in sample_types)))
        if sources:
            query = query.where(FileRecord.source.in_(sources))
        with self._database.reading() as session:
            total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
            at, ident = FileRecord.created_at, FileRecord.id
            if after is not None:
                last = self._find(session, owner, after)
                older = (at < last.created_at) | ((at == last.created_at) & (ident < last.id))
                newer = (at > last.created_at) | ((at == last.created_at) & (ident > last.id))
                query = query.where(older if newest_first else newer)
            order = (at.desc(), ident.desc()) if newest_first else (at, ident)
            page = session.scalars(query.order_by(*order).offset(offset).limit(limit))
            return [_file(record) for record in page], total

    def delete(self, owner: str, file_id: str) -> StoredFile:
        """Remove one of the owner's files for good."""
        with self._database.writing() as session:
            record = self._find(session, owner, file_id)
            gone = _file(record)
            session.delete(record)
        self._path(gone.id).unlink(missing_ok=True)
        return gone

    def read(self, owner: str, file_id: str) -> Iterator[bytes]:
        """Return the content in pieces. NotFoundError at once, StoreError when the content is not whole."""
        file = self.get(owner, file_id)
        path = self._path(file.id)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise StoreError(f"the content of file {file.id} is missing") from error

        def pieces() -> Iterator[bytes]:
            with stream:
                if os.fstat(stream.fileno()).st_size != file.size_bytes:
                    raise StoreError(f"the content of file {file.id} was changed on disk")
                while piece := stream.read(CHUNK_BYTES):
                    yield piece

        return pieces()

    def read_part(self, file_id: str, offset: int, size: int) -> bytes:
        """Return a part of a file's content by the file's id alone; StoreError when it is not there."""
        try:
            with self._path(file_id).open("rb") as stream:
                stream.seek(offset)
                part = stream.read(size)
        except OSError as error:
            raise StoreError(f"the content of file {file_id} is missing") from error
        if len(part) != size:
            raise StoreError(f"the content of file {file_id} was changed on disk")
        return part

    def is_whole(self, owner: str, file_id: str) -> bool:
        """Return True when the content still has the hash it was stored with."""
        file = self.get(owner, file_id)
        digest = hashlib.sha256()
        for piece in self.read(owner, file_id):
            digest.update(piece)
        return digest.hexdigest() == file.sha256

    def _remove_expired(self) -> None:
        over = FileRecord.expires_at <= self._clock()
        with self._database.reading() as session:
            ids = session.scalars(select(FileRecord.id).where(over)).all()
        if not ids:
            return
        with self._database.writing() as session:
            session.execute(delete(FileRecord).where(FileRecord.id.in_(ids)))
        for file_id in ids:
            self._path(file_id).unlink(missing_ok=True)

    def _find(self, session: Session, owner: str, file_id: str) -> FileRecord:
        query = select(FileRecord).where(
            FileRecord.id == file_id, FileRecord.owner == owner, self._is_alive()
        )
        record = session.scalars(query).one_or_none() if is_sound_id(file_id) else None
        if record is None:
            raise NotFoundError(f"no file of yours has the id {file_id[:64]!r}", field="file_id")
        return record

    def _is_alive(self):  # noqa: ANN202  # the expression's type has no short name
        return FileRecord.expires_at.is_(None) | (FileRecord.expires_at > self._clock())

    def _path(self, file_id: str) -> Path:
        # Ids come from our own database, but a path made from anything else must be impossible.
        return self.folder / str(uuid.UUID(file_id))

    def _sweep(self) -> None:
        with self._database.reading() as session:
            known = set(session.scalars(select(FileRecord.id)))
        for path in self.folder.iterdir():
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:
                continue
            if path.name not in known and age > ORPHAN_S:
                path.unlink(missing_ok=True)


def _sample_condition(name: str) -> ColumnElement[bool]:
    is_output, is_error = (
        FileRecord.purpose == OUTPUT,
        FileRecord.name.endswith(ERROR_ENDING, autoescape=True),
    )
    conditions = {
        "batch_request": FileRecord.purpose == "batch",
        "batch_error": is_output & is_error,
        "batch_result": is_output & ~is_error,
        "instruct": FileRecord.purpose.not_in(("batch", OUTPUT)),
    }
    return conditions.get(name, false())


def _file(record: FileRecord) -> StoredFile:
    return StoredFile(**{name: getattr(record, name) for name in StoredFile.__slots__})
