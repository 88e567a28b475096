import csv
import io
import json
import subprocess
import sys

import pytest

from bise.cli.app import run
from bise.errors import ConfigError
from bise.store.ledger import LedgerRow
from bise.store.opening import Store


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _json(capsys, *args):
    assert run([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_key_is_made_listed_and_revoked(home, capsys):
    limits = ["--requests-per-minute", "5", "--money-per-month", "12.50", "--expires-days", "1"]
    scopes = ["--scope", "inference", "--scope", "model:brise"]
    made = _json(capsys, "keys", "create", "--name", "ann", *scopes, *limits)
    assert made["key"].startswith("bise-")
    assert made["limits"] == {"requests_per_minute": 5, "money_per_month": "12.50", "priority": 0}
    (listed,) = _json(capsys, "keys", "list")
    assert listed["id"] == made["id"]
    assert "key" not in listed
    assert _json(capsys, "keys", "revoke", "ann")["revoked_at"]
    assert _json(capsys, "keys", "list") == []
    assert len(_json(capsys, "keys", "list", "--revoked")) == 1


def test_a_key_for_a_person_stands_alone_on_standard_output(home, capsys):
    assert run(["keys", "create", "--name", "ann"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip().startswith("bise-")
    assert len(shown.out.split()) == 1
    assert "cannot be shown again" in shown.err


def test_everything_under_bise_home_is_the_users_alone(home, capsys):
    run(["keys", "create", "--name", "ann"])
    for path in [home, *home.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert (home / "bise.db").exists()
    assert (home / "secret").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["keys", "create"],
        ["keys", "create", "--name", ""],
        ["keys", "create", "--name", "a", "--scope", "root"],
        ["keys", "create", "--name", "a", "--money-per-month", "much"],
        ["keys", "create", "--name", "a", "--expires-days", "0"],
        ["keys", "create", "--name", "a", "--rules", "/nowhere.toml"],
        ["keys", "revoke", "nobody"],
        ["keys", "list", "--db", "mysql://x"],
        ["usage", "--since", "yesterday"],
        ["usage", "--csv", "--json"],
        ["prices", "set", "m", "--input", "-1", "--output", "1"],
        ["prices", "remove", "m"],
        ["prices", "house", "--currency", "euro"],
        ["config", "show", "nothing"],
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(home, capsys, args):
    assert run(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1


def test_guardrails_come_from_a_file(home, capsys, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('[[rules]]\nname = "iban"\npattern = "DE[0-9]{20}"\nstage = "input"\n')
    made = _json(capsys, "keys", "create", "--name", "a", "--rules", str(path))
    assert made["rules"] == [{"name": "iban", "pattern": "DE[0-9]{20}", "stage": "input"}]
    path.write_text('[[rules]]\nname = "bad"\npattern = "("\n')
    assert run(["keys", "create", "--name", "a", "--rules", str(path)]) == 2
    assert "rule bad" in capsys.readouterr().err


def test_usage_is_told_as_table_csv_and_json(home, capsys):
    with Store.open() as store:
        info, _ = store.keys.create("=ann")
        for _ in range(2):
            store.ledger.record(
                LedgerRow(request_id="r", key_id=info.id, owner=info.owner, endpoint="/v1", model="m",
                          prompt_tokens=10, completion_tokens=5)
            )  # fmt: skip
    data = _json(capsys, "usage", "--by", "key")
    assert (data["total"]["requests"], data["total"]["total_tokens"]) == (2, 30)
    assert run(["usage", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["name"], row["prompt_tokens"]) == ("'=ann", "20")  # no formula for a spreadsheet
    assert run(["usage", "--by", "model"]) == 0
    table = capsys.readouterr().out
    assert "total" in table
    assert run(["usage", "--since", "2001-01-01", "--until", "2001-01-02", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["requests"] == 0


def test_prices_are_set_shown_and_removed(home, capsys):
    assert run(["prices", "set", "brise", "--input", "0.10", "--output", "0.30"]) == 0
    assert run(["prices", "house", "--energy", "0.31"]) == 0
    shown = _json(capsys, "prices")
    assert shown["prices"] == [{"model": "brise", "input": "0.1", "cached": "0.1", "output": "0.3"}]
    assert shown["rates"]["energy"] == "0.31"
    assert run(["prices", "remove", "brise"]) == 0
    assert _json(capsys, "prices")["prices"] == []


def _sources(capsys, *flags):
    options = _json(capsys, "config", "show", "serve", *flags)["options"]
    return {entry["option"]: (entry["value"], entry["source"]) for entry in options}


def test_flags_win_over_the_environment_over_the_file_over_the_defaults(home, capsys, monkeypatch):
    home.mkdir()
    (home / "config.toml").write_text('[serve]\nport = 1\ngrace = 1\nidle = 7\nallow-host = ["a", "b"]\n')
    monkeypatch.setenv("BISE_SERVE_PORT", "2")
    monkeypatch.setenv("BISE_SERVE_GRACE", "2")
    sources = _sources(capsys, "--port", "3")
    assert sources["--port"] == (3, "command line")
    assert sources["--grace"] == (2.0, "environment")
    assert sources["--idle"] == (7.0, "file")
    assert sources["--allow-host"] == (["a", "b"], "file")
    assert sources["--host"] == ("127.0.0.1", "default")


@pytest.mark.parametrize(("size", "expected"), [("16GiB", 16 << 30), ("0.5", 1 << 29), ("8G", 8 * 10**9)])
def test_memory_of_a_server_is_an_amount_and_a_plain_number_counts_gib(home, capsys, size, expected):
    assert _sources(capsys, "--memory", size, "--swap", size)["--memory"] == (expected, "command line")
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f"[serve]\nswap = {size if size == '0.5' else repr(size)}\n")
    assert _sources(capsys)["--swap"] == (expected, "file")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[serve]\nprot = 1\n", "prot"),
        ('[serve]\nport = "x"\n', "port"),
        ("[serve]\nport = 70000\n", "port"),
        ("[serve]\nport = [1]\n", "port"),
        ('[serve]\nno-key = "yes"\n', "no-key"),
        ('[serve]\nallow-host = "a"\n', "allow-host"),
        ("[srve]\nport = 1\n", "srve"),
        ("port = 1\n", "port"),
        ("[serve\n", "config.toml"),
        ("\xff", "config.toml"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_file_and_field(home, capsys, text, field):
    home.mkdir()
    (home / "config.toml").write_text(text, encoding="latin-1")
    assert run(["config", "show"]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert str(home / "config.toml") in error
    assert field in error
    assert len(error.strip().splitlines()) == 1


def test_the_file_gives_other_verbs_their_defaults_too(home, capsys):
    home.mkdir()
    (home / "config.toml").write_text('[usage]\nby = "day"\n')
    assert _json(capsys, "usage")["by"] == "day"
    assert _json(capsys, "usage", "--by", "model")["by"] == "model"


@pytest.mark.parametrize("verb", ["keys", "usage", "prices", "config", "serve"])
def test_help_imports_neither_the_database_nor_the_server(verb):
    code = (
        "import sys\nfrom bise.cli.app import run\n"
        f"run([{verb!r}, '--help'])\nprint('MODULES ' + ' '.join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"sqlalchemy", "alembic", "fastapi", "uvicorn"} & set(out.rpartition("MODULES ")[2].split())
