"""What a benchmark found, as a table for people and as one JSON document with its provenance."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from statistics import median
from typing import Any

from bise import __version__
from bise.bench.rounds import Series
from bise.plan import MachineLimits, Work

COLUMNS = ("OP", "PROMPT", "BATCH", "CONTEXT", "ENGINE", "TOK/S", "GB/S", "OF LIMIT", "BISE IS", "ROUNDS")

VERSIONS = ("numpy", "llama-cpp-python", "transformers", "torch", "ctranslate2", "gguf")


def result_of(series: Series, work: Work, limits: MachineLimits) -> dict[str, Any]:
    """Return one entry of `results`: medians of the kept turns; each turn is measured against its own probe.

    `work` is one step's for decode and the whole prompt's for prefill.
    """
    case = series.case
    steps = case.steps if case.op == "decode" else 1
    shares: list[float] = []
    rates: list[float] = []
    for turn in series.kept:
        then = MachineLimits(
            read_bytes_s=turn.read_bytes_s,
            int8_ops_s=turn.arithmetic[0] or limits.int8_ops_s,
            float_ops_s=turn.arithmetic[1] or limits.float_ops_s,
        )
        shares.append(steps * work.seconds(then) / turn.seconds)
        rates.append(steps * work.bytes_read / turn.seconds / 1e9)
    arithmetic = [turn.arithmetic[0] / 1e9 for turn in series.kept if turn.arithmetic[0]]
    joules = [turn.joules for turn in series.kept if turn.joules is not None]
    return {
        **asdict(case),
        "peer": series.contestant,
        "version": series.version,
        "tokens_per_s": case.tokens / series.seconds,
        "gb_per_s": median(rates),
        "gops": steps * work.operations / series.seconds / 1e9,
        "share_of_limit": median(shares),
        "read_gb_per_s": median(turn.read_bytes_s for turn in series.kept) / 1e9,
        "int8_gops": median(arithmetic) if arithmetic else None,
        "joules_per_token": median(joules) / case.tokens if joules else None,
        "rounds": len(series.turns),
        "rounds_kept": 0 if series.is_noisy else len(series.kept),
        "noisy": series.is_noisy,
        "tokens_per_s_rounds": [case.tokens / turn.seconds for turn in series.turns],
        "foreign_cores_rounds": [turn.foreign_cores for turn in series.turns],
    }


def with_ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with `bise_ratio` beside each peer: bise's tokens per second over the peer's."""
    keys = ("op", "prompt", "batch", "context")
    own = {tuple(entry[key] for key in keys): entry for entry in results if entry["peer"] == "bise"}
    told: list[dict[str, Any]] = []
    for entry in results:
        mine = own.get(tuple(entry[key] for key in keys))
        is_peer = entry["peer"] != "bise" and mine is not None
        ratio = mine["tokens_per_s"] / entry["tokens_per_s"] if is_peer and mine is not None else None
        told.append(entry | {"bise_ratio": ratio})
    return told


def columns(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the heads of the table: `COLUMNS`, and joules per token where the machine reports them."""
    return (*COLUMNS, "J/TOK") if _tells_joules(results) else COLUMNS


def _tells_joules(results: Sequence[Mapping[str, Any]]) -> bool:
    return any(entry["joules_per_token"] is not None for entry in results)


def table_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the results as cells under `columns`."""
    rows: list[list[str]] = []
    tells_joules = _tells_joules(results)
    for entry in results:
        ratio = entry.get("bise_ratio")
        kept = f"{entry['rounds_kept']} of {entry['rounds']}"
        rows.append([
            str(entry["op"]),
            str(entry["prompt"] or "-"),
            str(entry["batch"]),
            str(entry["context"] or "-"),
            str(entry["peer"]),
            f"{entry['tokens_per_s']:.1f}",
            f"{entry['gb_per_s']:.1f}",
            f"{entry['share_of_limit']:.0%}",
            "-" if ratio is None else f"{ratio:.2f}x",
            f"{kept} (noisy)" if entry["noisy"] else kept,
        ])  # fmt: skip
        if tells_joules:
            joules = entry["joules_per_token"]
            rows[-1].append("-" if joules is None else f"{joules:.3g}")
    return rows


def provenance(command: str, threads: int, isa: str) -> dict[str, Any]:
    """Return where, when and with what something was measured."""
    versions: dict[str, str] = {"bise": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.node(),
        "cpu": _processor(),
        "kernel": platform.release(),
        "isa": isa,
        "threads": threads,
        "commit": _commit(),
        "versions": versions,
        "command": command,
    }


def limits_fields(limits: MachineLimits) -> dict[str, float | None]:
    """Return the machine's limits as JSON values in units for people."""
    return {
        "read_gb_per_s": limits.read_bytes_s / 1e9,
        "int8_gops": None if limits.int8_ops_s is None else limits.int8_ops_s / 1e9,
        "float_gflops": None if limits.float_ops_s is None else limits.float_ops_s / 1e9,
    }


def limits_of(fields: Mapping[str, float | None]) -> MachineLimits:
    """Return the limits that `limits_fields` wrote."""
    read, whole, floats = fields["read_gb_per_s"], fields["int8_gops"], fields["float_gflops"]
    assert read is not None
    return MachineLimits(
        read_bytes_s=1e9 * read,
        int8_ops_s=None if whole is None else 1e9 * whole,
        float_ops_s=None if floats is None else 1e9 * floats,
    )


def limits_text(limits: MachineLimits) -> str:
    """Return the machine's limits as one line."""
    parts = [f"memory {limits.read_bytes_s / 1e9:.1f} GB/s"]
    if limits.int8_ops_s:
        parts.append(f"8-bit {limits.int8_ops_s / 1e9:,.0f} GOPS")
    if limits.float_ops_s:
        parts.append(f"float {limits.float_ops_s / 1e9:,.0f} GFLOPS")
    return ", ".join(parts)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree that this code runs from, a checkout or what `git archive` wrote;
    None for an installed package.
    """
    stamp = (resources.files("bise.bench") / "commit.txt").read_text("utf-8").strip()
    if not stamp.startswith("$"):  # `git archive` puts the commit there (.gitattributes)
        return stamp
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
