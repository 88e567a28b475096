"""Fail when a file, a function or the package outgrows its budget, or breaks a rule no linter knows.

Rules: files <= 500 lines; functions <= 60; only kernels/cpu.py imports `_native`; only config.py reads the
environment; no ISA object holds a weak function symbol (its instructions would leak into the baseline path).
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_EMBEDDED_BYTES = 40_000_000
"""The embedded model: all files together."""
MAX_EMBEDDED_FILE_BYTES = 36_000_000
MAX_PACKAGE_BYTES = 4 << 20
"""Python sources and data besides the embedded model."""
FORBIDDEN_NAMES = {"utils", "common", "base", "manager", "helpers", "types"}


def python_files() -> list[Path]:
    """Return every Python file of the project."""
    folders = [ROOT / name for name in ("src", "tests", "tools", "recipes", "benchmarks")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def native_files() -> list[Path]:
    """Return every C++ file."""
    suffixes = {".cpp", ".h", ".inl", ".hpp"}
    return sorted(path for path in (ROOT / "native").rglob("*") if path.suffix in suffixes)


def check_file_lengths(files: list[Path]) -> Iterator[str]:
    """Yield files with more than MAX_FILE_LINES lines, and files whose name says nothing."""
    for path in files:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            yield f"{name(path)}: {lines} lines (budget {MAX_FILE_LINES})"
        if path.stem in FORBIDDEN_NAMES:
            yield f"{name(path)}: the name says nothing about what is in it"


def check_functions(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield functions with more than MAX_FUNCTION_LINES lines, their docstring not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{name(path)}:{node.lineno}: {node.name}: {lines} lines (budget {MAX_FUNCTION_LINES})"


def check_imports(path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield imports of the native module outside kernels/cpu.py and environment reads outside config.py."""
    inside = name(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
            native = any(module.split(".")[-1] == "_native" for module in modules)
            if native and inside != "src/bise/kernels/cpu.py":
                yield f"{inside}:{node.lineno}: only kernels/cpu.py imports _native"
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv")
            and inside != "src/bise/config.py"
        ):
            yield f"{inside}:{node.lineno}: only config.py reads the environment"


def check_weak_symbols() -> Iterator[str]:
    """Yield weak function symbols in the ISA objects of the build directory, if there is one."""
    objects = [path for path in (ROOT / "build").rglob("*.o") if path.parent.name == "isa"]
    nm = shutil.which("nm")
    if nm is None:
        return
    for path in objects:
        listing = subprocess.run([nm, "-C", str(path)], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            # address, kind, name; an undefined symbol has no address and is no concern of this object.
            address, _, rest = line.partition(" ")
            kind, _, symbol = rest.partition(" ")
            if address and kind in ("W", "u"):
                yield f"{name(path)}: weak symbol {symbol} may leak instructions into the baseline path"


def check_sizes() -> Iterator[str]:
    """Yield what makes the installed package larger than its budget."""
    package = ROOT / "src" / "bise"
    embedded = package / "hub" / "brise"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    weights = [path for path in files if embedded in path.parents]
    rest = [path for path in files if embedded not in path.parents and path.suffix != ".so"]
    for label, group, budget in (
        ("src/bise/hub/brise", weights, MAX_EMBEDDED_BYTES),
        ("src/bise without it", rest, MAX_PACKAGE_BYTES),
    ):
        size = sum(path.stat().st_size for path in group)
        if size > budget:
            yield f"{label}: {size:,} bytes (budget {budget:,})"
    for path in weights:
        if path.stat().st_size > MAX_EMBEDDED_FILE_BYTES:
            yield f"{name(path)}: {path.stat().st_size:,} bytes (budget {MAX_EMBEDDED_FILE_BYTES:,} per file)"


def name(path: Path) -> str:
    """Return a path as people know it, from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def main() -> int:
    """Print every breach and return 1, or a line that says all is well and 0."""
    files = python_files()
    breaches = [*check_file_lengths(files + native_files())]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        breaches += check_functions(path, tree)
        if name(path).startswith("src/"):
            breaches += check_imports(path, tree)
    breaches += [*check_weak_symbols(), *check_sizes()]
    for breach in breaches:
        print(breach)
    print(f"budget: {len(files)} Python files checked, {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
