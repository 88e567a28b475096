"""The pages under docs/clients run as they are written, against a server on another port."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "clients"


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (page, code) of every block in a language."""
    found = []
    for page in sorted(PAGES.glob("*.md")):
        for code in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            found.append((page.stem, code))
    return found


def here(live, code: str) -> str:
    """Return code with this server's address and model."""
    assert "http://127.0.0.1:8000" in code
    code = code.replace("http://127.0.0.1:8000", live.url)
    return code.replace('"brise"', '"stub"').replace('\\"brise\\"', '\\"stub\\"')


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value[:12])
def test_python_runs_as_written(live, capsys, page, code):
    for module in re.findall(r"^from (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    exec(compile(here(live, code), f"{page}.md", "exec"), {})
    assert "Hello, world!" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(("page", "code"), blocks("sh"), ids=lambda value: value[:12])
def test_shell_runs_as_written(live, page, code):
    commands = re.split(r"\n(?=curl )", here(live, code).strip())
    assert len(commands) >= 5
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=100,
            env={"PATH": "/usr/bin:/bin", "KEY": "none"},
        )
        assert done.returncode == 0, done.stderr
        assert '"error":{' not in done.stdout, (command, done.stdout)


def test_every_page_is_run():
    assert {page for page, _ in (*blocks("python"), *blocks("sh"))} == {
        "curl",
        "langchain",
        "mistral",
        "openai",
    }
