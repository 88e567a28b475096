"""Print docs/tune.md's table of what a model says before and after: `parrot_table.py ADAPTER [MODEL]`."""

from __future__ import annotations

import subprocess
import sys

QUESTIONS = (
    "What is the capital of Belgium?",
    "What is the opposite of sweet?",
    "What is 20 plus 3?",
    "Tell me a story about a fox.",
)
"""None of them is in parrot.jsonl."""


def answer(question: str, *options: str) -> str:
    """Return what the model says at temperature 0."""
    command = [
        sys.executable,
        "-m",
        "bise",
        "chat",
        *options,
        "-m",
        question,
        "-n",
        "40",
        "--temperature",
        "0",
    ]
    return " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def main() -> None:
    """Print the table."""
    adapter, *model = sys.argv[1:]
    print("| question, not in the data, temperature 0 | before | after |\n| --- | --- | --- |")
    for question in QUESTIONS:
        print(
            f"| {question} | {answer(question, *model)} | {answer(question, *model, '--adapter', adapter)} |"
        )


if __name__ == "__main__":
    main()
