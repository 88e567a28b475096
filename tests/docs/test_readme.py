"""README and docs say what is there: links, targets, verbs, flags; slow: its commands in a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest

from bise.cli.app import VERBS, bise

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page.name


def test_every_verb_and_flag_that_the_readme_shows_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    shown = re.findall(r"^bise ([a-z]+)([^\n#]*)", blocks, re.MULTILINE)
    assert len(shown) >= 5
    for verb, rest in shown:
        assert verb in VERBS
        command = bise.get_command(click.Context(bise), verb)
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), rest.split()[0])
        flags = {flag for param in command.params for flag in param.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", rest)) <= flags


def test_the_readme_begins_with_five_lines_and_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    introduction = text.split("\n\n")[1]
    assert len(introduction.splitlines()) == 5
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make chat", "make test"]


def test_the_generated_command_line_page_is_fresh():
    subprocess.run([sys.executable, str(ROOT / "tools" / "cli_page.py"), "--check"], check=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    path = tmp_path_factory.mktemp("fresh") / "bise"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(path)], check=True)
    return path


@pytest.mark.slow
def test_a_fresh_clone_answers_piped_lines_and_starts_again_without_installing(clone, tmp_path):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment["BISE_HOME"] = str(tmp_path / "home")
    for installs in (True, False):
        done = subprocess.run(
            ["make", "chat"],
            input="Hello!\n",
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip()
        assert ("installing" in done.stderr) is installs


@pytest.mark.slow
def test_the_wheel_holds_the_extension_the_embedded_model_and_the_type_marker(clone, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(clone)], check=True
    )
    (wheel,) = tmp_path.glob("bise-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"bise/_native\..*\.so", name) for name in names)
    for name in (
        "bise/py.typed",
        "bise/_native.pyi",
        "bise/hub/brise/model.safetensors",
        "bise/hub/brise/SHA256SUMS",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "recipes/", "tools/"))]
