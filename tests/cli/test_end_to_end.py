"""The real thing: a process, the embedded model, the native kernels."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("bise._native", reason="the native extension is not built")


@pytest.fixture
def bise(tmp_path):
    home = tmp_path / "home"

    def call(*args: str, stdin: str = "", code: int = 0, **env: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"BISE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)} | env
        done = subprocess.run(
            [sys.executable, "-m", "bise", *args],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            timeout=100,
            cwd=tmp_path,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    call.home = home
    return call


def test_one_message_is_answered_and_the_model_says_how_small_it_is(bise):
    done = bise("chat", "--message", "Hello!", "--temperature", "0")
    assert done.stdout.strip()
    honest = next(line for line in done.stderr.splitlines() if line.startswith("brise: "))
    assert "million parameters" in honest
    assert "bise chat PATH" in honest
    assert not bise.home.exists()


def test_each_piped_line_gets_an_answer(bise):
    done = bise("chat", "--json", "--temperature", "0", stdin="Hello!\nThank you.\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert all(answer["content"] for answer in answers)
    assert answers[1]["usage"]["prompt_tokens"] > answers[0]["usage"]["total_tokens"]


def test_the_same_seed_gives_the_same_text_with_any_number_of_threads_and_instruction_set(bise):
    args = ("generate", "-p", "Once upon a time", "-n", "24", "--seed", "11", "--json")
    runs = [
        json.loads(bise(*args, "--threads", "1").stdout),
        json.loads(bise(*args, "--threads", "3").stdout),
        json.loads(bise(*args, BISE_ISA="scalar").stdout),
    ]
    assert runs[0]["token_ids"] == runs[1]["token_ids"] == runs[2]["token_ids"]
    assert json.loads(bise(*args[:-2], "12", "--json").stdout)["token_ids"] != runs[0]["token_ids"]


def test_the_score_of_a_generated_text_is_its_reported_log_probs(bise, tmp_path):
    prompt = "Once upon a time"
    made = json.loads(
        bise("generate", "-p", prompt, "-n", "20", "--seed", "1", "--json", "--logprobs", "0").stdout
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": prompt + made["text"]}) + "\n")
    score = json.loads(bise("score", str(rows), "--json").stdout)
    tail = len(made["token_ids"])
    if score["token_ids"][-tail:] != made["token_ids"]:
        pytest.skip("the text is tokenised in another way than it was generated")
    assert score["logprobs"][-tail:] == [entry["logprob"] for entry in made["logprobs"]]
    assert score["logprobs"][0] is None


def test_a_chat_is_scored_over_the_assistants_turns(bise, tmp_path):
    user, assistant = {"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello there!"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"messages": m}) for m in ([user, assistant], [user, assistant] * 2))
    )
    first, second = (json.loads(line) for line in bise("score", str(rows), "--json").stdout.splitlines())
    counted = first["logprobs"][-first["counted_tokens"] :]
    assert first["perplexity"] == pytest.approx(math.exp(-sum(counted) / len(counted)), rel=1e-12)
    assert second["counted_tokens"] == 2 * first["counted_tokens"]
    assert second["token_ids"][: len(first["token_ids"])] == first["token_ids"]
    assert second["logprobs"][: len(first["logprobs"])] == first["logprobs"]


def test_inspect_tells_the_embedded_models_shape(bise):
    report = json.loads(bise("inspect", "--json").stdout)
    shape = report["shape"]
    per_token = 2 * 2 * shape["layers"] * shape["kv_heads"] * shape["head_dim"]
    window = report["windows"][0]
    assert report["kv_cache"]["bytes_per_token"] == per_token
    assert report["kv_cache"]["bytes_at"]["32k"] == per_token * min(window or 32768, 32768)
    assert sum(entry["parameters"] for entry in report["formats"]) == report["parameters"]["total"]
    assert report["licence"]


def test_doctor_finds_this_installation_in_order(bise):
    report = json.loads(bise("doctor", "--json").stdout)
    assert report["ok"]
    assert report["embedded_intact"]
    assert report["isa"] in report["isa_available"]
    assert report["packages"]["numpy"]


def test_doctor_looks_for_every_package_that_bise_needs():
    from bise.cli.doctor import DEPENDENCIES

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=!;~ ]", line)[0] for line in project["dependencies"]}
    assert needed <= set(DEPENDENCIES)


def test_doctor_names_an_instruction_set_that_cannot_run(cli, monkeypatch):
    monkeypatch.setenv("BISE_ISA", "neon")
    done = cli("doctor")
    assert done.code == 1
    assert "verdict       broken" in done.out
    assert len(done.err.splitlines()) == 1
    assert "BISE_ISA" in done.err or "neon" in done.err


def test_doctor_names_a_home_that_cannot_be_written(cli, monkeypatch, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("BISE_HOME", str(blocker / "home"))
    done = cli("doctor")
    assert done.code == 1
    assert "BISE_HOME" in done.err


def test_a_quantised_copy_is_smaller_and_talks(bise, tmp_path):
    from bise.hub.embedded import embedded_path

    out = tmp_path / "q4"
    report = json.loads(
        bise("quantize", str(embedded_path()), "--quant", "q4", "--out", str(out), "--json").stdout
    )
    assert report["bytes"] < report["bytes_before"]
    assert bise("chat", str(out), "-m", "Hello!").stdout.strip()


def test_a_context_shorter_than_the_question_is_refused_with_numbers(cli):
    done = cli("chat", "-m", "word " * 60, "--context", "32")
    assert done.code == 2
    (line,) = done.error_lines
    assert "32" in line


@pytest.mark.parametrize("name", ["", "model.gguf", "config.json"])
def test_a_path_that_holds_no_model_is_one_line_and_exit_2(cli, tmp_path, name):
    folder = tmp_path / "bad"
    folder.mkdir()
    if name:
        (folder / name).write_bytes(b"nonsense")
    done = cli("generate", str(folder), "-p", "x")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert str(folder) in done.err


def test_state_is_private_to_the_user(bise):
    bise("chat", stdin="Hello!\n/save talk\n")
    assert stat.S_IMODE(bise.home.stat().st_mode) == 0o700
    assert [path.relative_to(bise.home) for path in bise.home.rglob("*.json")] == [Path("chats/talk.json")]


def test_a_chat_with_the_embedded_model_imports_nothing_it_does_not_need(bise, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom bise.cli.app import run\ncode = run(['chat', '-m', 'Hello!'])\n"
        "print('MODULES', *sys.modules)\nsys.exit(code)"
    )
    environment = os.environ | {"BISE_HOME": str(bise.home), "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    loaded = set(out.rpartition("MODULES ")[2].split())
    assert "bise.engine.engine" in loaded
    assert not loaded & {
        "torch",
        "mistral_common",
        "sentencepiece",
        "rich",
        "requests",
        "huggingface_hub",
        "PIL",
    }
