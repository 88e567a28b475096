from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import click
import pytest

STATIC = Path(__file__).parents[2] / "src" / "bise" / "server" / "static"


def test_chat_web_serves_the_assistant_on_a_free_port_and_opens_it(tmp_path):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser.py"
    browser.write_text(f"import sys\nopen({str(opened)!r}, 'w').write(sys.argv[1])\n")
    environment = os.environ | {
        "BISE_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "BROWSER": f"{sys.executable} {browser} %s",
        "PATH": str(tmp_path),  # so that no other opener is found
    }
    command = [sys.executable, "-m", "bise", "chat", "--web", "--context", "256", "--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, text=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            page = re.search(r"the assistant is at (http://127\.0\.0\.1:\d+/)", lines[1])[1]
            # A development install has no page unless `make web` was run; the server is there all the same.
            shown = page if (STATIC / "index.html").is_file() else page + "health"
            assert urllib.request.urlopen(shown, timeout=60).status == 200
            until = time.monotonic() + 60
            while not (opened.is_file() and opened.read_text()):
                assert time.monotonic() < until, "no browser was opened"
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "leaked" not in process.stderr.read()
    assert opened.read_text() == page


@pytest.mark.parametrize("option", [["-m", "hi"], ["--json"], ["--system", "S"], ["--temperature", "0"]])
def test_what_belongs_to_the_terminal_does_not_go_with_web(cli, option):
    result = cli("chat", "--web", *option)
    assert result.code == 2
    assert "does not go with --web" in result.error_lines[0]


@pytest.fixture
def values():
    """What `bise serve` hands on when no option is given."""
    from bise.cli.serve import command

    values = dict.fromkeys(param.name for param in command.params)
    values |= {"aliases": (), "adapters": (), "drafts": (), "quant": "auto", "kv": "auto", "sequences": 2}
    return values | {"device": "cpu", "dtype": "auto", "offload": "auto"}


def test_serve_hands_the_prefix_directory_and_the_swap_to_every_model(tmp_path, values):
    from bise.cli.serve import _specs

    (spec,) = _specs((None,), values | {"prefix_cache": str(tmp_path), "swap": 1 << 29})
    assert (spec.prefix_cache_dir, spec.swap_bytes) == (tmp_path, 2**29)
    (plain,) = _specs((None,), values)
    assert (plain.prefix_cache_dir, plain.swap_bytes) == (None, 0)


def test_serve_gives_each_model_the_draft_model_that_is_named_for_it(tmp_path, values):
    from bise.cli.serve import _specs

    one, two, small = (tmp_path / name for name in ("one", "two", "small"))
    for path in (one, two, small):
        path.mkdir()
    models = (str(one), str(two))
    specs = _specs(models, values | {"drafts": (str(small),)})
    assert [spec.draft for spec in specs] == [small, None]
    specs = _specs(models, values | {"drafts": (f"two={small}",)})
    assert [spec.draft for spec in specs] == [None, small]
    for drafts, reason in [
        ((f"three={small}",), "names a model that is not served: three"),
        (("one=",), "needs [MODEL=]DRAFT"),
        ((str(small), f"one={small}"), "one can have one draft model, got 2"),
    ]:
        with pytest.raises(click.UsageError) as caught:
            _specs(models, values | {"drafts": drafts})
        assert reason in str(caught.value)
