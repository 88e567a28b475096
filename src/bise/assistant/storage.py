"""Where conversations live: the platform's database, and memory for temporary chats, behind one face."""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from bise.store.chat_schema import ASSISTANT_TABLES, SEARCH_DDL
from bise.store.schema import Record


class Storage(Protocol):
    """What the assistant needs of a database; `bise.store.database.Database` has it."""

    def reading(self) -> AbstractContextManager[Session]:
        """Give a session that sees one state."""
        ...

    def writing(self) -> AbstractContextManager[Session]:
        """Give a session that is one transaction."""
        ...


class Memory:
    """The assistant's tables in this process's memory alone: nothing reaches a disk."""

    def __init__(self) -> None:
        self._engine = create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        self._close = weakref.finalize(self, self._engine.dispose)
        self._lock = threading.Lock()  # there is one connection, so one transaction at a time
        with self._engine.begin() as connection:
            connection.execute(text("PRAGMA foreign_keys=ON"))
            connection.execute(text("PRAGMA temp_store=MEMORY"))  # large sorts would spill into a file
            Record.metadata.create_all(connection, tables=list(ASSISTANT_TABLES))
            connection.execute(text(SEARCH_DDL))

    @contextmanager
    def reading(self) -> Generator[Session]:
        """Give a session that nobody writes beside."""
        with self._lock, Session(self._engine, expire_on_commit=False) as session:
            yield session
            session.rollback()

    @contextmanager
    def writing(self) -> Generator[Session]:
        """Give a session that is committed at the end, undone by an exception."""
        with self._lock, Session(self._engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    def close(self) -> None:
        """Forget everything; so does who lets go of it."""
        self._close()


def new_id() -> str:
    """Return a UUID of version 7: unique, and ordered by time of making to the millisecond."""
    value = (int(time.time() * 1000) << 80) | int.from_bytes(os.urandom(10))
    value = (value & ~(0xF << 76)) | (7 << 76)
    value = (value & ~(0x3 << 62)) | (2 << 62)
    return str(uuid.UUID(int=value))
