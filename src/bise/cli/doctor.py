"""`bise doctor`: is this machine and this installation fit to run models, and with what."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from bise import __version__
from bise.cli.output import write_json, write_pairs
from bise.errors import BiseError

DEPENDENCIES = (
    "numpy",
    "safetensors",
    "tokenizers",
    "mistral-common",
    "sentencepiece",
    "jinja2",
    "click",
    "rich",
    "llguidance",
    "jsonschema",
    "fastapi",
    "uvicorn",
    "httptools",
    "httpx",
    "pydantic",
    "python-multipart",
    "sqlalchemy",
    "alembic",
    "prometheus-client",
    "google-re2",
    "argon2-cffi",
    "pypdf",
)
"""All that pyproject.toml lists, and the extra of mistral-common; a test holds the two together."""
OPTIONAL = ("torch",)


class BrokenInstallationError(BiseError):
    """The installation or the machine cannot run models; the message says why."""

    code = "broken_installation"


@dataclass(slots=True)
class Findings:
    """What was found, for people and as JSON, and what is wrong."""

    pairs: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    problems: list[str] = field(default_factory=list[str])

    def tell(self, name: str, text: str, **facts: Any) -> None:
        """Note a line for people and its facts."""
        self.pairs.append((name, text))
        self.facts |= facts


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Check this machine and this installation.

    Exits with 1 and one line when something is broken.
    """
    findings = Findings()
    for check in (_software, _processor, _devices, _memory, _energy, _state, _embedded):
        check(findings)
    if as_json:
        write_json(findings.facts | {"ok": not findings.problems, "problems": findings.problems}, indent=2)
    else:
        write_pairs([*findings.pairs, ("verdict", "broken" if findings.problems else "ready")])
    if findings.problems:
        raise BrokenInstallationError("; ".join(findings.problems))


def _software(findings: Findings) -> None:
    python = platform.python_version()
    findings.tell(
        "bise", f"{__version__}, Python {python} on {platform.platform()}", bise=__version__, python=python
    )
    versions: dict[str, str | None] = {}
    for name in (*DEPENDENCIES, *OPTIONAL):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            if name not in OPTIONAL:
                findings.problems.append(f"the package {name} is missing; reinstall bise")
    present = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    findings.tell("packages", present, platform=platform.platform(), packages=versions)


def _processor(findings: Findings) -> None:
    from bise.config import default_threads

    name = processor_name()
    try:
        threads: int | None = default_threads()
    except BiseError as error:
        threads = None
        findings.problems.append(str(error))
    findings.tell(
        "processor", f"{name}, {os.cpu_count()} logical cores", processor=name, logical_cores=os.cpu_count()
    )
    findings.tell(
        "threads", f"{threads or 'unknown'} (BISE_THREADS or --threads changes it)", threads=threads
    )
    try:
        from bise.kernels.cpu import CpuOps, detected_isas

        isa, available = CpuOps().isa, list(detected_isas())
    except (BiseError, ImportError) as error:
        reason = " ".join(str(error).split())
        broken = isinstance(error, ImportError)
        findings.problems.append(f"the native extension does not load: {reason}" if broken else reason)
        findings.tell("instructions", "unknown", isa=None, isa_available=[])
        return
    findings.tell(
        "instructions",
        f"{isa} in use; this processor can run {', '.join(available)} (BISE_ISA forces one)",
        isa=isa,
        isa_available=available,
    )


def _devices(findings: Findings) -> None:
    from bise.engine.device import visible_devices

    try:
        found = visible_devices()
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        findings.tell("devices", f"PyTorch does not load: {reason}", devices=None)
        return
    absent = "PyTorch is not installed (pip install 'bise[torch]' for --device cuda or mps)"
    told = absent if found is None else "; ".join(found) or "PyTorch sees no device but the processor"
    findings.tell("devices", told, devices=None if found is None else list(found))


def processor_name() -> str:
    """Return the processor's name for people."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory(findings: Findings) -> None:
    from bise.hub.registry import gigabytes

    total, available = memory_bytes()
    shown = "unknown" if total is None else gigabytes(total)
    free = "" if available is None else f", {gigabytes(available)} available"
    findings.tell("memory", shown + free, memory_total_bytes=total, memory_available_bytes=available)


def memory_bytes() -> tuple[int | None, int | None]:
    """Return total and available memory in bytes, within a container's limit; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform != "win32" else None
        return pages, None
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and (total is None or limit < total):
        left = max(limit - (used or 0), 0)
        return limit, left if available is None else min(available, left)
    return total, available


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _energy(findings: Findings) -> None:
    from bise.store.energy import MachineMeter

    sources = MachineMeter().sources
    told = " and ".join(sources).upper() if sources else "cannot be read (no RAPL counter, no NVML)"
    findings.tell("energy", told, energy_sources=list(sources))


def _state(findings: Findings) -> None:
    from bise.config import bise_home

    home = bise_home()
    nearest = home
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    state = "exists" if home.exists() else "not made yet"
    findings.tell("BISE_HOME", f"{home} ({state})", home=str(home), home_exists=home.exists())
    if not writable:
        findings.problems.append(f"BISE_HOME {home} cannot be written; set BISE_HOME to a directory of yours")


def _embedded(findings: Findings) -> None:
    from bise.hub.embedded import damaged_files, embedded_path

    try:
        path, damaged = embedded_path(), damaged_files()
    except BiseError as error:
        findings.problems.append(str(error))
        findings.tell("own model", "missing", embedded=None, embedded_intact=False)
        return
    verdict = "every file matches its hash" if not damaged else f"damaged: {', '.join(damaged)}"
    findings.tell("own model", f"{path} ({verdict})", embedded=str(path), embedded_intact=not damaged)
    if damaged:
        findings.problems.append(f"the embedded model is damaged ({', '.join(damaged)}); reinstall bise")
