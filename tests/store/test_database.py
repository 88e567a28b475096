import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text

# Their records are compared with the migrations, too.
import bise.store.chat_schema
import bise.store.tuning  # noqa: F401
from bise.errors import ConfigError, StoreError
from bise.store.database import BUSY_TIMEOUT_S, Database, DatabaseDownError, _wal_mode, migrate
from bise.store.schema import Record, SettingRecord


def test_the_migrations_make_the_tables_that_the_records_describe(database):
    with database.engine.connect() as connection:
        # The search index is SQLite's own machinery and no record.
        named = {"include_name": lambda name, kind, _: kind != "table" or "message_search" not in name}
        context = MigrationContext.configure(connection, opts={"compare_type": True} | named)
        assert compare_metadata(context, Record.metadata) == []


def test_what_is_written_is_there_after_reopening(database_url):
    database = Database.open(database_url)
    with database.writing() as session:
        session.add(SettingRecord(name="a", value="1"))
    database.close()
    again = Database.open(database_url)
    with again.reading() as session:
        assert session.get(SettingRecord, "a").value == "1"
    again.close()


def test_an_exception_undoes_the_whole_transaction(database):
    def fail():
        with database.writing() as session:
            session.add(SettingRecord(name="a", value="1"))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.reading() as session:
        assert session.get(SettingRecord, "a") is None


def test_sqlite_waits_for_the_disk_and_runs_in_wal_mode(tmp_path):
    database = Database.open(str(tmp_path / "x.db"))
    with database.reading() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA synchronous")).scalar() == 2
        assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1
    database.close()


def test_only_what_need_not_last_does_not_wait_for_the_disk(tmp_path):
    database = Database.open(str(tmp_path / "x.db"))
    for is_lasting, level in [(True, 2), (False, 1), (True, 2), (False, 1), (True, 2)]:
        with database.writing(is_lasting=is_lasting) as session:
            assert session.execute(text("PRAGMA synchronous")).scalar() == level
    database.close()


def test_the_database_file_is_its_users_alone(tmp_path):
    Database.open(str(tmp_path / "x.db")).close()
    assert (tmp_path / "x.db").stat().st_mode & 0o077 == 0


def test_an_older_bise_refuses_a_newer_schema_in_one_line(database_url):
    database = Database.open(database_url)
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StoreError, match="schema 9999, made by a newer bise") as caught:
        Database.open(database_url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_a_bad_url_is_refused_by_name(url):
    with pytest.raises(ConfigError) as caught:
        Database.open(url)
    assert caught.value.field == "db"


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        Database.open(str(path))


def test_a_server_that_does_not_answer_is_named_without_the_password():
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError) as caught:
        Database.open("postgresql://bise:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_sixteen_writers_in_sixteen_connections_meet_no_locked_database(database_url):
    databases = [Database.open(database_url) for _ in range(4)]
    failures = []

    def write(number):
        try:
            for count in range(5):
                with databases[number % 4].writing() as session:
                    session.add(SettingRecord(name=f"{number}.{count}", value=""))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with databases[0].reading() as session:
        assert session.execute(text("SELECT count(*) FROM settings")).scalar() == 80
    for database in databases:
        database.close()
    assert failures == []


def test_two_processes_that_migrate_at_once_both_succeed(database_url):
    failures = []

    def open_():
        try:
            Database.open(database_url).close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=open_) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_who_switches_a_new_file_at_the_same_moment_is_waited_for(tmp_path):
    """SQLite answers 1 in 1,000 of them with SQLITE_BUSY after no time, in spite of its timeout."""

    class Met(sqlite3.Connection):
        met = 0

        def execute(self, statement):
            if "journal_mode" in statement and self.met < 3:
                self.met += 1
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(statement)

    connection = sqlite3.connect(tmp_path / "new.db", factory=Met)
    assert _wal_mode(connection) == "wal"
    assert connection.met == 3
    connection.close()


def test_a_migration_from_the_first_schema_keeps_its_rows(database_url, monkeypatch):
    _make_old(database_url, monkeypatch)
    database = Database.open(database_url)
    with database.reading() as session:
        assert session.get(SettingRecord, "kept").value == "yes"
        assert session.execute(text("SELECT count(*) FROM files")).scalar() == 0
    database.close()


def _make_old(url, monkeypatch):
    """Make a database with the first revision's schema and one row."""
    with monkeypatch.context() as patch:
        patch.setattr("bise.store.database.migrate", lambda database: migrate(database, "0001"))
        database = Database.open(url)
    with database.writing() as session:
        session.add(SettingRecord(name="kept", value="yes"))
    database.close()


_KILLED = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from bise.store.database import Database
left = int(sys.argv[2])
@event.listens_for(Engine, "after_cursor_execute")
def after(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Database.open(sys.argv[1]).close()
"""


@pytest.mark.slow
def test_a_kill_at_any_statement_of_a_migration_leaves_the_old_schema_or_the_new(tmp_path, monkeypatch):
    _kill_migrations(tmp_path, monkeypatch, range(1, 100))


def test_a_kill_at_some_statements_of_a_migration_leaves_the_old_schema_or_the_new(tmp_path, monkeypatch):
    _kill_migrations(tmp_path, monkeypatch, (3, 11))


def _kill_migrations(tmp_path, monkeypatch, statements):
    num_killed = 0
    for start in ("new", "old"):
        for statement in statements:
            path = tmp_path / f"{start}{statement}.db"
            if start == "old":
                _make_old(str(path), monkeypatch)
            command = [sys.executable, "-c", _KILLED, str(path), str(statement)]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr.decode()
            num_killed += 1
            with sqlite3.connect(path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            connection.close()
            has_old, has_new = "ledger" in tables, "batch_lines" in tables
            assert has_old == (start == "old") or has_new, "half a schema"
            database = Database.open(str(path))
            with database.reading() as session:
                assert start == "new" or session.get(SettingRecord, "kept").value == "yes"
                assert session.execute(text("SELECT count(*) FROM batch_lines")).scalar() == 0
            database.close()
    assert num_killed >= 4


def test_a_postgresql_that_stops_is_reported_and_used_again_when_it_is_back(postgres):
    database = Database.open(postgres.new_url())
    with database.writing() as session:
        session.add(SettingRecord(name="before", value="1"))

    def write(name):
        with database.writing() as session:
            session.add(SettingRecord(name=name, value="1"))

    postgres.stop()
    try:
        with pytest.raises(StoreError, match="cannot be used now"):
            write("lost")
    finally:
        postgres.start()
    write("after")
    with database.reading() as session:
        names = set(session.execute(text("SELECT name FROM settings")).scalars())
    assert {"before", "after"} <= names
    assert "lost" not in names
    database.close()


def test_a_glance_does_not_wait_for_a_file_that_another_process_keeps_to_itself(tmp_path):
    path = tmp_path / "bise.db"
    database = Database.open(str(path))
    with database.writing() as session:
        session.add(SettingRecord(name="a", value="1"))
    query = select(SettingRecord.value).where(SettingRecord.name == "a")
    assert database.glance(query, {})["value"] == "1"
    database.close()  # its connections, that is: the next one is made when it is needed
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    with pytest.raises(DatabaseDownError):
        database.glance(query, {})
    assert time.monotonic() - began < BUSY_TIMEOUT_S / 3
    other.close()
    assert database.glance(query, {})["value"] == "1"
    database.close()
