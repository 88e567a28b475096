"""Opening the database, transactions, and the schema's migrations.

SQLite in WAL mode under BISE_HOME by default, PostgreSQL by URL. What a `writing()` block did is on disk when
the block is left without an exception, unless it says that nobody needs it after a power failure: SQLite runs
with synchronous=FULL, and without waiting for the disk for such a block.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, Self

from alembic.config import Config as AlembicConfig
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, RowMapping, Select, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from bise.config import state_directory, user_path
from bise.errors import ConfigError, StoreError

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 30
"""How long a writer waits for another process's transaction before the client is told to come back."""
_MIGRATION_LOCK = 0x62697365
"""Number of the PostgreSQL advisory lock that lets one process migrate at a time."""


class DatabaseDownError(StoreError):
    """The database did not answer or refused to work. What clients read says no more than that."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("the database cannot be used now; try again soon")
        self.cause = cause
        """The driver's own error, for the operator."""


class Database:
    """A database that is open and at this version's schema. Any thread may use it."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine that `open` made; use `Database.open`."""
        self._engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._glances = _hasty(engine.url) if self.is_sqlite else engine
        # Waiting in one queue here is fair and costs nothing; SQLite's own waiting is polling.
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """Open (and make, when it is new) the database and bring its schema up to date.

        `url` is a path, a `sqlite:///PATH` or a `postgresql://USER:PASSWORD@HOST/NAME`; None means `bise.db`
        under BISE_HOME. Raises ConfigError for a bad URL, StoreError when it cannot be used or was made by
        a newer bise.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            _make_private(Path(parsed.database or ""))
        database = cls(_engine(parsed))
        try:
            migrate(database)
        except DatabaseDownError as error:
            database.close()
            raise StoreError(
                f"{parsed.render_as_string(hide_password=True)}: {first_line(error.cause)}; "
                "mend it or name another database with --db"
            ) from error
        except BaseException:
            database.close()
            raise
        return database

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for tests and tools that look at the schema."""
        return self._engine

    @contextmanager
    def reading(self) -> Generator[Session]:
        """Give a session whose reads see one state of the database; nothing is written."""
        with self._session(is_writing=False) as session:
            yield session
            session.expunge_all()  # records stay readable after the end
            session.rollback()

    def glance(self, query: Select[Any], parameters: Mapping[str, object]) -> RowMapping | None:
        """Return the one row that a query finds, None without one: a single statement, no transaction.

        A database file that another process keeps to itself is not waited for: DatabaseDownError at once.
        """
        try:
            with self._glances.connect() as connection:
                return connection.execute(query, parameters).mappings().one_or_none()
        except (DBAPIError, PoolTimeoutError) as error:
            raise _unavailable(error) from error

    @contextmanager
    def writing(self, *, is_lasting: bool = True) -> Generator[Session]:
        """Give a session that is one transaction: committed at the end, undone by an exception.

        What is not `is_lasting` may be gone after a power failure (all of it or nothing), though not after
        the end of a process.
        """
        with self._writer, self._session(is_writing=True, is_lasting=is_lasting) as session:
            yield session
            session.commit()

    def close(self) -> None:
        """Close all connections."""
        self._glances.dispose()
        self._engine.dispose()

    @contextmanager
    def _session(self, *, is_writing: bool, is_lasting: bool = True) -> Generator[Session]:
        options = {"bise_writes": is_writing, "bise_lasts": is_lasting}
        try:
            with (
                self._engine.connect() as connection,
                Session(connection.execution_options(**options), expire_on_commit=False) as session,
            ):
                yield session
        except (IntegrityError, ProgrammingError, DataError):
            raise  # the caller's doing, not the database's
        except (DBAPIError, PoolTimeoutError) as error:
            raise _unavailable(error) from error


def migrate(database: Database, target: str = "head") -> None:
    """Bring the schema to `target` in one transaction: a crash leaves the old schema or the new one.

    Raises StoreError when the database was made by a newer bise.
    """
    script = ScriptDirectory(str(resources.files("bise.store") / "migrations"))
    with database.writing() as session:
        connection = session.connection()
        if not database.is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        current = _revision(connection)
        known = {revision.revision for revision in script.walk_revisions()}
        if current is not None and current not in known:
            raise StoreError(
                f"the database has schema {current}, made by a newer bise; this one knows up to "
                f"{script.get_current_head()}: update bise, or name another database with --db"
            )
        if current == (script.get_current_head() if target == "head" else target):
            return

        def steps(revision: Any, _: Any) -> Any:
            return script._upgrade_revs(target, revision)  # pyright: ignore[reportPrivateUsage]

        environment = EnvironmentContext(
            AlembicConfig(), script, fn=steps, destination_rev=target, dont_mutate=False
        )
        with environment:
            environment.configure(connection=connection, transactional_ddl=True)
            environment.run_migrations()
        logger.info("event=schema_migrated from=%s to=%s", current, _revision(connection))


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision; None for an empty database."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _parse(url: str | None) -> URL:
    if url is None:
        return URL.create("sqlite", database=str(state_directory() / "bise.db"))
    if "://" not in url:
        if not url.strip():
            raise ConfigError("db is empty; give a path or a postgresql:// URL", field="db")
        return URL.create("sqlite", database=str(user_path(url)))
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(
            "db is not a database URL; expected a path or postgresql://USER:PASSWORD@HOST/NAME", field="db"
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    raise ConfigError(
        f"db {parsed.drivername}:// is not supported; use a path, sqlite:///PATH or postgresql://...",
        field="db",
    )


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, so that it is the user's alone; its -wal and -shm copy its mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}; name another database with --db") from error


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(
                url, pool_pre_ping=True, pool_timeout=10, connect_args={"connect_timeout": 5}
            )
        except ImportError as error:
            raise ConfigError(
                "a PostgreSQL database needs its driver: pip install 'bise[postgres]'", field="db"
            ) from error
    engine = create_engine(
        url,
        pool_size=16,
        max_overflow=16,
        pool_timeout=BUSY_TIMEOUT_S,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _hasty(url: URL) -> Engine:
    """Return connections to an SQLite file that wait for nobody and open no transactions."""
    engine = create_engine(url, pool_size=1, max_overflow=16, connect_args={"timeout": 0})
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _wal_mode(connection: sqlite3.Connection) -> str:
    """Switch to WAL and return the mode that the file has now.

    Where others switch a new file at the same moment, SQLite may give up at once whatever the connection's
    timeout: so that wait is here.
    """
    until = time.monotonic() + connection.execute("PRAGMA busy_timeout").fetchone()[0] / 1000
    while True:
        try:
            return connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    # The driver must not open transactions on its own: it would leave DDL outside of them.
    connection.isolation_level = None
    mode = _wal_mode(connection)
    if mode != "wal":
        raise StoreError(
            f"the database's file system does not allow WAL mode (SQLite answered {mode}); "
            "put it on a local disk with --db"
        )
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: a transaction that reads first and then writes could not wait for it.
    options = connection.get_execution_options()
    if not options.get("bise_writes", False):
        connection.exec_driver_sql("BEGIN")
        return
    synchronous = "FULL" if options["bise_lasts"] else "NORMAL"
    if connection.info.get("bise_synchronous") != synchronous:  # statements cost more than they seem to do
        connection.exec_driver_sql(f"PRAGMA synchronous={synchronous}")
        connection.info["bise_synchronous"] = synchronous
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _unavailable(error: Exception) -> DatabaseDownError:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    logger.error("event=store_failed kind=%s detail=%r", type(cause).__name__, first_line(cause))
    return DatabaseDownError(cause)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; PostgreSQL's following ones quote rows."""
    return (str(error).splitlines() or [""])[0]


def is_sound_id(value: str) -> bool:
    """Return True for what could be one of our ids. Databases differ in what they make of anything else."""
    return 0 < len(value) <= 64 and value.isascii() and value.replace("-", "").replace("_", "").isalnum()
