"""The page of promises names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", PAGE)))


def test_every_test_that_the_page_names_exists():
    assert len(NAMED) > 50
    for path, name in NAMED:
        assert (ROOT / path).exists(), path
        if name:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"


def test_every_line_of_the_page_names_a_test():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert all("`tests/" in line for line in lines if not line.startswith("| ---"))
