from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from bise.bench.report import columns, provenance, result_of, table_rows, with_ratios
from bise.bench.rounds import Case, Series, Turn
from bise.plan import MachineLimits, Work

LIMITS = MachineLimits(read_bytes_s=40e9, int8_ops_s=800e9, float_ops_s=200e9)
DECODE = Case(op="decode", prompt=0, batch=2, context=16, steps=10)
PREFILL = Case(op="prefill", prompt=100, batch=1, context=0, steps=0)


def series_of(case, seconds, peer="bise", rate=20e9, foreign=0.0):
    turns = [
        Turn(seconds=s, read_before=rate, read_after=rate, foreign_cores=foreign, joules=5.0) for s in seconds
    ]
    return Series(peer, "1.2", case, turns)


def test_decode_is_held_against_the_read_rate_of_its_own_round():
    work = Work(tokens=2, bytes_read=1e9, operations=1e9, is_float=False)
    entry = result_of(series_of(DECODE, [1.0, 2.0, 1.0]), work, LIMITS)
    assert entry["tokens_per_s"] == 20.0
    assert entry["gb_per_s"] == pytest.approx(10.0)
    assert entry["share_of_limit"] == pytest.approx(0.5)  # 10 of the round's 20 GB/s, not of the run's 40
    assert entry["joules_per_token"] == 0.25


def test_prefill_is_held_against_the_arithmetic_rate():
    work = Work(tokens=100, bytes_read=1e6, operations=400e9, is_float=False)
    entry = result_of(series_of(PREFILL, [1.0]), work, LIMITS)
    assert entry["tokens_per_s"] == 100.0
    assert entry["gops"] == pytest.approx(400.0)
    assert entry["share_of_limit"] == pytest.approx(0.5)


def test_prefill_is_held_against_the_arithmetic_rate_of_its_own_round():
    series = series_of(PREFILL, [1.0])
    series.turns[0] = dataclasses.replace(series.turns[0], arithmetic=(500e9, None))
    work = Work(tokens=100, bytes_read=1e6, operations=400e9, is_float=False)
    entry = result_of(series, work, LIMITS)
    assert entry["share_of_limit"] == pytest.approx(0.8)  # of the round's 500, not of the run's 800
    assert entry["int8_gops"] == 500.0


def test_each_peer_stands_beside_how_much_faster_bise_is():
    work = Work(tokens=100, bytes_read=1e6, operations=400e9, is_float=False)
    entries = with_ratios([
        result_of(series_of(PREFILL, [1.0]), work, LIMITS),
        result_of(series_of(PREFILL, [2.5], peer="llama.cpp Q4_0"), work, LIMITS),
    ])  # fmt: skip
    assert entries[0]["bise_ratio"] is None
    assert entries[1]["bise_ratio"] == 2.5


def test_the_fields_that_readers_of_the_document_rely_on_are_there():
    work = Work(tokens=2, bytes_read=1e9, operations=1e9, is_float=False)
    entry = with_ratios([result_of(series_of(DECODE, [1.0]), work, LIMITS)])[0]
    assert {"op", "prompt", "batch", "context", "tokens_per_s", "gb_per_s", "share_of_limit", "peer"} <= set(
        entry
    )
    json.dumps(entry, allow_nan=False)


def test_a_row_of_the_table_has_a_cell_per_column_and_shows_noise():
    work = Work(tokens=2, bytes_read=1e9, operations=1e9, is_float=False)
    quiet = with_ratios([result_of(series_of(DECODE, [1.0]), work, LIMITS)])
    noisy = with_ratios([result_of(series_of(DECODE, [1.0], foreign=1.0), work, LIMITS)])
    row = table_rows(quiet)[0]
    assert len(row) == len(columns(quiet))
    assert row == ["decode", "-", "2", "16", "bise", "20.0", "10.0", "50%", "-", "1 of 1", "0.25"]
    assert table_rows(noisy)[0][-2] == "0 of 1 (noisy)"


def test_provenance_names_machine_versions_and_command():
    origin = provenance("bise bench", 2, "avx2")
    assert origin["command"] == "bise bench"
    assert origin["threads"] == 2
    assert origin["versions"]["numpy"]
    assert {"date", "machine", "cpu", "kernel", "isa", "commit"} <= set(origin)


def test_a_tree_that_git_archive_wrote_names_its_commit():
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "-C", str(root), "archive", "HEAD", "src/bise/bench/commit.txt"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile("src/bise/bench/commit.txt")
        assert member is not None
        stamp = member.read().decode().strip()
    head = ["git", "-C", str(root), "rev-parse", "HEAD"]
    assert subprocess.run(head, capture_output=True, check=True, text=True).stdout.startswith(stamp)


def test_joules_have_a_column_only_where_the_machine_reports_them():
    work = Work(tokens=2, bytes_read=1e9, operations=1e9, is_float=False)
    series = series_of(DECODE, [1.0])
    series.turns[0] = dataclasses.replace(series.turns[0], joules=None)
    silent = with_ratios([result_of(series, work, LIMITS)])
    assert "J/TOK" not in columns(silent)
    assert len(table_rows(silent)[0]) == len(columns(silent))
