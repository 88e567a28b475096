"""`bise backup`: save, check and restore what `bise serve` keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bise.cli.keys import database_option
from bise.cli.output import aside, write_json

if TYPE_CHECKING:
    from bise.store.backup import Manifest

_file = click.Path(path_type=Path, dir_okay=False)


@click.group("backup")
def command() -> None:
    """Save, check and restore keys, ledger, chats, files, secret and configuration.

    Models and caches are not part of a backup. Keep it safe: it holds the server's secret and people's chats.
    """


@command.command("create")
@click.argument("file", type=_file)
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create(file: Path, db: str | None, as_json: bool) -> None:
    """Write a backup to FILE, a tar file; servers may go on meanwhile."""
    from bise.config import state_directory
    from bise.store.backup import write_backup
    from bise.store.opening import Store

    with Store.open(db) as store:
        manifest = write_backup(store.database, store.files, state_directory(), file)
        if not store.database.is_sqlite:
            aside("note: a PostgreSQL database is not part of it; save that with pg_dump")
    _tell(file, manifest, as_json, "saved")


@command.command("verify")
@click.argument("file", type=_file)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(file: Path, as_json: bool) -> None:
    """Check every byte of a backup."""
    from bise.store.backup import read_backup

    _tell(file, read_backup(file), as_json, "sound")


@command.command("restore")
@click.argument("file", type=_file)
@click.option("--replace", is_flag=True, help="Put what is in BISE_HOME into a folder beside it first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def restore(file: Path, replace: bool, as_json: bool) -> None:
    """Check a backup and put it into BISE_HOME, which no server may use meanwhile."""
    from bise.config import state_directory
    from bise.store.backup import restore_backup

    _tell(file, restore_backup(file, state_directory(), replace=replace), as_json, "restored")


def _tell(file: Path, manifest: Manifest, as_json: bool, done: str) -> None:
    taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.taken_at))
    if as_json:
        write_json(
            {
                "file": str(file),
                "taken_at": int(manifest.taken_at),
                "schema": manifest.revision or None,
                "members": len(manifest.members),
                "files": manifest.num_files,
            }
        )
        return
    what = f"schema {manifest.revision}" if manifest.revision else "without database"
    click.echo(f"{done}: {file} ({what}, {manifest.num_files} files, taken {taken})")
