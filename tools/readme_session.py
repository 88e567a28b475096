"""Capture the session that README.md shows: fixed questions, seed 1, whatever the embedded model answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
QUESTIONS = (
    "Hello!",
    "What are you?",
    "What is a river?",
    "What is 3 + 4?",
    "Tell me a short story about a cat.",
)
WIDTH = 112


def main() -> None:
    """Ask the questions and put the answers into the README."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-m", "bise", "chat", "--seed", "1", "--json"],
            input="\n".join(QUESTIONS),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"BISE_HOME": home},
        )
    answers = [json.loads(line)["content"] for line in done.stdout.splitlines()]
    lines = ['$ make chat ARGS="--seed 1"', *wrapped(done.stderr.strip())]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        lines += [f"bise> {question}", *wrapped(answer)]
    block = "```\n" + "\n".join(lines) + "\n```"
    text = README.read_text(encoding="utf-8")
    text, count = re.subn(
        r"(?<=\(lines wrapped here\)\.\n\n)```\n.*?\n```", lambda _: block, text, count=1, flags=re.DOTALL
    )
    if not count:
        raise SystemExit("README.md has no session to replace")
    README.write_text(text, encoding="utf-8")


def wrapped(text: str) -> list[str]:
    """Return lines of at most WIDTH characters."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH) or [""]]


if __name__ == "__main__":
    main()
