from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from bise.cli.app import VERBS, bise, run
from bise.errors import EngineError

FAKE = Path(__file__).parent / "fake_model.py"
HEAVY = (
    "numpy",
    "torch",
    "tokenizers",
    "mistral_common",
    "sentencepiece",
    "jinja2",
    "rich",
    "safetensors",
    "readline",
)


def imported(*args: str) -> set[str]:
    code = (
        "import sys\nfrom bise.cli.app import run\n"
        f"run({list(args)!r})\nprint('MODULES ' + ' '.join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(out.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["chat", "--help"], ["generate", "--help"], ["score", "--help"]]
)
def test_help_imports_nothing_heavy(args):
    loaded = imported(*args)
    assert not loaded & set(HEAVY)
    assert "bise.cli.app" in loaded


def test_importing_bise_imports_no_other_package():
    # An editable install brings import hooks of its own; their names start with an underscore.
    code = "import sys\nbefore = set(sys.modules)\nimport bise\nprint(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in out.split()} - sys.stdlib_module_names
    assert {name for name in packages if not name.startswith("_")} == {"bise"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_summary_of_a_verb_is_the_first_line_of_its_help(verb):
    command = bise.get_command(click.Context(bise), verb)
    assert command is not None
    assert command.help.splitlines()[0] == VERBS[verb]


def test_no_arguments_show_the_help(cli):
    result = cli()
    assert result.code == 0
    assert "generate" in result.out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nope"], "No such command 'nope' (see `bise --help`)"),
        (["--nope"], "No such option '--nope' (see `bise --help`)"),
        (["generate"], "Missing option '--prompt' / '-p' (see `bise generate --help`)"),
        (["chat", "-n", "x"], "Invalid value for '--max-tokens' / '-n': 'x' "
         "is not a whole number (see `bise chat --help`)"),
        (["generate", "-p", "a", "--logprobs", "2"], "--logprobs needs --json (see `bise generate --help`)"),
        (["generate", "/no/such", "-p", "a"], "/no/such: no such file or directory"),
        (["inspect", "/no/such.gguf"], "/no/such.gguf: no such file or directory"),
        (["inspect", "~nobody-here/x"],
         "~nobody-here/x: the system knows no such home directory; write the whole path, or set HOME"),
        (["serve", "--prefix-cache", "/dev/null/x"],
         "--prefix-cache /dev/null/x: Not a directory; name a directory that you may write to "
         "(see `bise serve --help`)"),
        (["chat", "mistral-7c"],
         "'mistral-7c' is not a file, a directory or a known alias; "
         "did you mean mistral-7b? `bise models` lists the aliases"),
        (["serve", "--port", "x"],
         "Invalid value for '--port': 'x' is not a whole number (see `bise serve --help`)"),
        (["score"], "give a FILE, or a MODEL and a FILE (see `bise score --help`)"),
        (["quantize", "x"],
         "Missing option '--quant'. Choose from: q4, q8, bf16 (see `bise quantize --help`)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_2(cli, args, line):
    result = cli(*args)
    assert result.code == 2
    assert result.err == f"bise: error: {line}\n"
    assert result.out == ""


def test_an_alias_that_is_not_here_says_what_to_fetch_and_where_to_put_it(cli, home):
    result = cli("chat", "mixtral-8x7b")
    assert result.code == 2
    assert "mistralai/Mixtral-8x7B-Instruct-v0.1" in result.err
    assert str(home / "models" / "mixtral-8x7b") in result.err
    assert len(result.err.splitlines()) == 1


def test_removing_a_model_that_is_not_there_says_so_before_it_asks(cli, home):
    result = cli("models", "rm", "nothere")
    assert result.code == 2
    assert "there is no model 'nothere'" in result.err


def test_a_home_that_is_a_file_is_one_line_that_names_it(process, home):
    home.write_text("")
    result = process("keys", "list")
    assert result.code == 1
    assert result.err == (
        f"bise: error: {home}: File exists; BISE_HOME must be a directory that you may write to\n"
    )


def test_a_database_that_cannot_be_opened_is_one_line_without_a_log(process, tmp_path):
    (tmp_path / "bise.db").write_text("no database " * 100)
    result = process("keys", "list", "--db", str(tmp_path / "bise.db"))
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert line.startswith("bise: error: sqlite:")


def test_text_that_is_not_utf8_is_a_mistake(cli, model_dir):
    result = cli("generate", str(model_dir), "--prompt", "\udcff")
    assert result.code == 2
    assert "is not valid UTF-8 text" in result.err


def test_our_own_failure_is_one_line_and_exit_1(cli, fake, model_dir):
    fake.engine.fails_with = EngineError("the engine failed: boom")
    result = cli("generate", str(model_dir), "-p", "a", "--json")
    assert result.code == 1
    assert result.err == "bise: error: the engine failed: boom\n"
    assert fake.closed


def test_a_bug_is_one_line_that_names_the_debug_switch(cli, fake, model_dir, monkeypatch):
    monkeypatch.setattr(fake.engine, "submit", lambda request: 1 / 0)
    result = cli("generate", str(model_dir), "-p", "a")
    assert result.code == 1
    assert result.error_lines == [
        "bise: error: internal error, please report it: ZeroDivisionError: division by zero "
        "(BISE_DEBUG=1 shows where)"
    ]


def test_the_debug_switch_shows_the_traceback(home, fake, model_dir, monkeypatch, capfd):
    monkeypatch.setenv("BISE_DEBUG", "1")
    monkeypatch.setattr(fake.engine, "submit", lambda request: 1 / 0)
    assert run(["generate", str(model_dir), "-p", "a"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_an_interrupt_exits_130_without_a_traceback(cli, fake, model_dir):
    fake.engine.interrupt_after = 3
    result = cli("generate", str(model_dir), "-p", "abcdef")
    assert result.code == 130
    assert result.out == "ech"
    assert fake.engine.cancelled == 1
    assert fake.closed


def test_a_signal_while_a_line_is_awaited_exits_130(home, model_dir):
    with subprocess.Popen(
        [sys.executable, str(FAKE), "chat", str(model_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ),
    ) as child:  # fmt: skip
        assert child.stderr.readline()  # the start line: it is up and waits for input
        child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        code = child.wait(timeout=max(deadline - time.monotonic(), 0))
        rest = child.stderr.read().decode()
    assert code == 130
    assert "Traceback" not in rest


def test_a_reader_that_leaves_early_is_no_error(home, model_dir):
    lines = "x" * 100 + "\n"
    with subprocess.Popen(
        [sys.executable, str(FAKE), "chat", str(model_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ),
    ) as child:  # fmt: skip
        child.stdout.close()
        child.stdin.write(lines.encode())
        child.stdin.close()
        rest = child.stderr.read().decode()
        code = child.wait(timeout=20)
    assert code == 141
    assert "Traceback" not in rest
    assert "error" not in rest.lower()


def test_nothing_is_written_outside_bise_home(process, home, model_dir, tmp_path, monkeypatch):
    elsewhere = tmp_path / "user"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    for args in (
        ["chat", str(model_dir), "-m", "hi"],
        ["models"],
        ["generate", str(model_dir), "-p", "x", "--json"],
    ):
        result = process(
            *args,
            HOME=str(elsewhere),
            XDG_CACHE_HOME=str(elsewhere / "c"),
            XDG_CONFIG_HOME=str(elsewhere / "k"),
        )
        assert result.code == 0, result.err
    after = [path for path in sorted(tmp_path.rglob("*")) if home not in (path, *path.parents)]
    assert after == before
