"""kill -9 while everything is written: what was acknowledged is there, once, and the database is sound."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bise.store.opening import Store

WRITER = """
import itertools, sys
from pathlib import Path
from bise.store.ledger import LedgerRow
from bise.store.opening import Store

def said(*words):
    sys.stdout.write(" ".join(words) + "\\n")
    sys.stdout.flush()

folder, round_ = Path(sys.argv[1]), sys.argv[2]
store = Store.open(str(folder / "bise.db"), folder=folder / "files", secret=folder / "secret")
said("ready")
for number in itertools.count():
    name = f"{round_}.{number}"
    info, key = store.keys.create(name)
    said("key", info.id, key)
    held = store.limits.reserve(info, 10)
    row = LedgerRow(request_id=name, key_id=info.id, owner=info.owner, endpoint="/x", model="m",
                    prompt_tokens=3, completion_tokens=4)
    with store.database.writing() as session:
        store.ledger.record(row, session)
        store.limits.settle(held, 7, 0 * row.prompt_tokens + __import__("decimal").Decimal(0), session)
    said("row", name, info.id)
    file = store.files.create(info.owner, name, "batch", [name.encode()])
    said("file", info.owner, file.id, name)
    for line in store.batches.claim(2):
        billed = LedgerRow(request_id=f"line{line.number}", key_id=None, owner="local", endpoint="/b",
                           model="m", completion_tokens=1, idempotency_key=line.idempotency_key)
        store.ledger.record(billed)
        store.batches.complete(line, 200, name, {"n": line.number})
        said("line", str(line.number))
"""


def _open(folder: Path) -> Store:
    return Store.open(str(folder / "bise.db"), folder=folder / "files", secret=folder / "secret")


def _round(folder: Path, name: str, num_words: int) -> list[list[str]]:
    """Run the writer, kill it a while after it acknowledged `num_words` things; return what it did."""
    command = [sys.executable, "-c", WRITER, str(folder), name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        said = []
        for line in writer.stdout:
            said.append(line.split())
            if len(said) > num_words:
                writer.send_signal(signal.SIGKILL)
                break
        said += [line.split() for line in writer.stdout if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL
    return [words for words in said if words != ["ready"]]


def _kill_loop(folder: Path, rounds: int, seed: int) -> None:
    (folder / "files").mkdir(parents=True)
    draw = random.Random(seed)
    num_lines = rounds * 20
    with _open(folder) as store:
        lines = (json.dumps({"body": {"model": "m", "n": n}}).encode() + b"\n" for n in range(num_lines))
        file = store.files.create("local", "in", "batch", lines)
        job = store.batches.create("local", endpoint="/b", input_files=[file.id])
        assert job.total == num_lines
    said: list[list[str]] = []
    for number in range(rounds):
        said += _round(folder, f"r{number}", draw.randrange(0, 40))
        connection = sqlite3.connect(folder / "bise.db")
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
    with _open(folder) as store:
        _check_acknowledged(store, said)
        _finish_batch(store, job.id, num_lines, {int(words[1]) for words in said if words[0] == "line"})


def _check_acknowledged(store: Store, said: list[list[str]]) -> None:
    rows = Counter(row.request_id for row in store.ledger.rows(limit=1_000_000))
    for kind, *words in said:
        if kind == "key":
            assert store.keys.verify(words[1]).id == words[0]
        elif kind == "row":
            assert rows[words[0]] == 1
        elif kind == "file":
            owner, file_id, name = words
            assert b"".join(store.files.read(owner, file_id)).decode() == name
            assert store.files.is_whole(owner, file_id)
    assert max(rows.values(), default=1) == 1, "a request was billed twice"
    assert len([words for words in said if words[0] == "row"]) > 0


def _finish_batch(store: Store, batch_id: str, num_lines: int, acknowledged: set[int]) -> None:
    """Do the rest of the batch and look at the result: every line once."""
    redone = set()
    while lines := store.batches.claim(100):
        for line in lines:
            redone.add(line.number)
            assert store.batches.complete(line, 200, "end", {"n": line.number})
    assert not redone & acknowledged, "a line that was done was done again"
    (closed,) = store.batches.close_finished()
    assert (closed.succeeded, closed.failed) == (num_lines, 0)
    output = store.batches.output_lines("local", batch_id)
    assert [line["response"]["body"]["n"] for line in output] == list(range(num_lines))


def test_what_was_acknowledged_survives_sigkill(tmp_path):
    _kill_loop(tmp_path / "home", rounds=4, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_was_acknowledged_survives_200_sigkills(tmp_path):
    _kill_loop(tmp_path / "home", rounds=200, seed=2)
