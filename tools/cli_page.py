"""Write docs/cli.md from `--help`, or with --check fail when the page is not what --help says today."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bise.cli.app import VERBS, bise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """\
# The command line

Generated from `--help` by `make docs`; `make check` fails when it is stale.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 our fault,
2 the user's, 130 interrupted, 141 the reader went away. An error is one line; `BISE_DEBUG=1` adds the
traceback.

| variable | meaning |
| --- | --- |
| `BISE_HOME` | where all state lives; default: the platform's data directory |
| `BISE_THREADS` | worker threads; default: the processors this process may use |
| `BISE_ISA` | force `scalar`, `avx2` or `avx512`; an error where the processor cannot run it |
| `BISE_DEBUG` | `1` prints a traceback with an error |
| `NO_COLOR` | anything: no colours |
"""


def page() -> str:
    """Return the page."""
    sections = [HEAD, section("bise", bise)]
    for verb in VERBS:
        command = bise.get_command(click.Context(bise), verb)
        assert command is not None
        sections.append(section(f"bise {verb}", command))
        if isinstance(command, click.Group):
            sections += [section(f"bise {verb} {name}", part) for name, part in command.commands.items()]
    return "\n".join(sections)


def section(title: str, command: click.Command) -> str:
    """Return one command's help as a section."""
    context = click.Context(command, info_name=title, terminal_width=100, help_option_names=["-h", "--help"])
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```\n{text}\n```\n"


def main() -> int:
    """Write or check the page."""
    text = page()
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/cli.md is stale: run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
