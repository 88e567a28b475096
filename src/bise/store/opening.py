"""Everything that a server or a command keeps, opened together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bise.store.allowances import Allowances
from bise.store.batches import Batches
from bise.store.database import Database
from bise.store.files import Files
from bise.store.keys import Keys
from bise.store.ledger import Ledger
from bise.store.limits import Limits
from bise.store.prices import PriceBook
from bise.store.replays import Replays
from bise.store.responses import Responses
from bise.store.secret import load_secret
from bise.store.tuning import TuningJobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """One database and what is in it. Use it as a context manager, or `close` it."""

    database: Database
    secret: bytes
    keys: Keys
    allowances: Allowances
    limits: Limits
    prices: PriceBook
    ledger: Ledger
    files: Files
    batches: Batches
    responses: Responses
    replays: Replays
    tuning: TuningJobs
    clock: Callable[[], float]

    @classmethod
    def open(
        cls,
        url: str | None = None,
        *,
        folder: Path | None = None,
        secret: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the database at `url`, with file contents in `folder` and the server's secret in the file
        `secret`; all three are under BISE_HOME by default. Raises ConfigError or StoreError.
        """
        database = Database.open(url)
        try:
            secret_bytes = load_secret(secret)
            files = Files(database, folder, clock)
            return cls(
                database=database,
                secret=secret_bytes,
                keys=Keys(database, secret_bytes, clock),
                allowances=Allowances(database, clock),
                limits=Limits(database, clock),
                prices=PriceBook(database),
                ledger=Ledger(database, clock),
                files=files,
                batches=Batches(database, files, clock),
                responses=Responses(database, clock),
                replays=Replays(database, clock),
                tuning=TuningJobs(database, clock),
                clock=clock,
            )
        except BaseException:
            database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database's connections."""
        self.database.close()
