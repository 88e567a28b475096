from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "budget.py"


@pytest.fixture
def budget(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("budget", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_long_file_and_a_name_that_says_nothing_are_named(budget, tmp_path):
    long = put(tmp_path, "src/bise/long.py", "x = 1\n" * 501)
    utils = put(tmp_path, "src/bise/utils.py", "")
    fine = put(tmp_path, "src/bise/fine.py", "x = 1\n" * 500)
    breaches = list(budget.check_file_lengths([long, utils, fine]))
    assert [breach.split(":")[0] for breach in breaches] == ["src/bise/long.py", "src/bise/utils.py"]


@pytest.mark.parametrize(
    ("lines", "docstring", "breaches"), [(59, "", 0), (60, "", 1), (59, '    """\n    Long.\n    """\n', 0)]
)
def test_a_long_function_is_named_and_its_docstring_is_free(budget, tmp_path, lines, docstring, breaches):
    path = put(tmp_path, "src/bise/a.py", "def f():\n" + docstring + "    x = 1\n" * lines)
    assert len(list(budget.check_functions(path, ast.parse(path.read_text())))) == breaches


@pytest.mark.parametrize(
    ("name", "code", "breaches"),
    [
        ("src/bise/cli/a.py", "from bise import _native", 1),
        ("src/bise/cli/a.py", "import bise._native", 1),
        ("src/bise/kernels/cpu.py", "from bise import _native", 0),
        ("src/bise/cli/a.py", "import os\nos.environ['X']", 1),
        ("src/bise/cli/a.py", "import os\nos.getenv('X')", 1),
        ("src/bise/config.py", "import os\nos.environ['X']", 0),
    ],
)
def test_imports_and_environment_reads_in_the_wrong_place_are_named(budget, tmp_path, name, code, breaches):
    path = put(tmp_path, name, code)
    assert len(list(budget.check_imports(path, ast.parse(code)))) == breaches


@pytest.mark.parametrize(
    ("code", "weak"),
    [("inline int f(int x) { return x; }", True), ("static int f(int x) { return x; }", False)],
)
def test_an_isa_object_with_a_weak_function_is_named(budget, tmp_path, code, weak):
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm")
    source = put(tmp_path, "build/x.dir/isa/avx2.cpp", code + "\nint g(int x) { return f(x); }\n")
    subprocess.run(["g++", "-O0", "-c", str(source), "-o", str(source) + ".o"], check=True)
    assert bool(list(budget.check_weak_symbols())) is weak


def test_a_heavy_embedded_file_is_named(budget, tmp_path, monkeypatch):
    put(tmp_path, "src/bise/hub/brise/model.safetensors", "x" * 100)
    monkeypatch.setattr(budget, "MAX_EMBEDDED_FILE_BYTES", 99)
    assert "model.safetensors" in next(budget.check_sizes())
