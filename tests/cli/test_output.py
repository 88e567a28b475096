from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from bise.cli.output import ProgressBar, write_table


def on_a_terminal(*args: str, **env: str) -> str:
    """Run bise with a pseudo-terminal as its standard output and return what it wrote."""
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", **env}
    with subprocess.Popen([sys.executable, "-m", "bise", *args], stdout=slave, env=environment) as child:
        os.close(slave)
        parts: list[bytes] = []
        try:
            while part := os.read(master, 65536):
                parts.append(part)
        except OSError:  # the other end is closed
            pass
        child.wait(timeout=90)
    os.close(master)
    return b"".join(parts).decode()


def test_a_terminal_gets_colours_unless_no_color_is_set(tmp_path):
    assert "\x1b[" in on_a_terminal("models", BISE_HOME=str(tmp_path))
    assert "\x1b[" not in on_a_terminal("models", BISE_HOME=str(tmp_path), NO_COLOR="1")


@pytest.mark.parametrize("verb", ["models", "doctor"])
def test_a_pipe_gets_no_colours(cli, verb):
    result = cli(verb)
    assert "\x1b" not in result.out + result.err


def test_a_table_aligns_numbers_to_the_right_and_cuts_nothing(capsys):
    write_table(["NAME", "SIZE"], [["a" * 200, "1.5 GB"], ["b", "12 GB"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "a" * 200 + "  1.5 GB"
    assert lines[2] == "b".ljust(202) + " 12 GB"


def test_a_table_may_be_empty(capsys):
    write_table(["NAME", "SIZE"], [])
    assert capsys.readouterr().out == "NAME  SIZE\n"


def test_no_bar_is_drawn_into_a_pipe(capfd):
    with ProgressBar() as bar:
        bar._started -= 10
        bar("packing", 0.5)
    assert capfd.readouterr().err == ""
