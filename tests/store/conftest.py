"""The suite runs on SQLite, and on a real PostgreSQL when this machine has one."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from bise.store.database import Database
from bise.store.keys import Keys


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self, now: float = 1_800_000_000.0):  # 2027-01-15 08:00:00 UTC
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def _postgres_bin() -> Path | None:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = str(versions[-1]) if versions else shutil.which("initdb")
    return Path(found).parent if found else None


class PostgresServer:
    """A PostgreSQL of our own in a temporary folder, listening on loopback only."""

    def __init__(self, binaries: Path, port: int):
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="bise-pg-"))
        self.port = port
        self.user = None
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            self.user = "postgres"
            entry = pwd.getpwnam("postgres")
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "bise", "-A", "trust", "--no-sync")
        self.start()
        self._names = itertools.count()
        self._has_template = False

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self.folder}"
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l",
                  str(self.folder / "log"), "-w", "start")  # fmt: skip

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def new_url(self) -> str:
        """Return the URL of an empty schema of its own: far quicker to make than a database."""
        import psycopg

        name = f"t{next(self._names)}"
        server = f"postgresql://bise@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{server}?options=-csearch_path%3D{name}"

    def migrated_url(self) -> str:
        """Return the URL of a database of its own with today's schema: a copy takes half of what migrations
        take.
        """
        import psycopg

        server = f"postgresql://bise@127.0.0.1:{self.port}"
        name, template = f"d{next(self._names)}", "migrated"
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            if not self._has_template:
                connection.execute(f"CREATE DATABASE {template}")
                Database.open(f"{server}/{template}").close()
                self._has_template = True
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return f"{server}/{name}"

    def _run(self, program: str, *args: str) -> None:
        command = [str(self.binaries / program), *args]
        done = subprocess.run(
            command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")


@pytest.fixture(scope="session")
def postgres(free_port):
    """A running PostgreSQL; skips where there is none."""
    yield from running_postgres(free_port())


def running_postgres(port):
    """Yield a PostgreSQL that runs until the generator is closed; skips where there is none."""
    binaries = _postgres_bin()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine (apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the driver is missing (pip install 'bise[postgres]')")
    server = PostgresServer(binaries, port)
    yield server
    server.stop()
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request, tmp_path):
    """Where a new, empty database can be made; every test that uses it runs on both kinds.

    For tests that have `database` its schema is there already.
    """
    is_migrated = "database" in request.fixturenames
    if request.param == "sqlite":
        if is_migrated:
            shutil.copy(request.getfixturevalue("migrated"), tmp_path / "bise.db")
        return str(tmp_path / "bise.db")
    server = request.getfixturevalue("postgres")
    return server.migrated_url() if is_migrated else server.new_url()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """The file of an empty SQLite database with today's schema: a copy of it costs less than migrations."""
    return migrated_file(tmp_path_factory.mktemp("migrated"))


def migrated_file(folder: Path) -> Path:
    """Make the file of `migrated`."""
    Database.open(str(folder / "bise.db")).close()
    return folder / "bise.db"


@pytest.fixture
def database(database_url):
    database = Database.open(database_url)
    yield database
    database.close()


@pytest.fixture
def clock():
    return FakeClock()


SECRET = bytes(range(32))


@pytest.fixture
def keys(database, clock):
    return Keys(database, SECRET, clock)
