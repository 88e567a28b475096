"""`bise tune` as a user types it, with a real tiny model behind it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")


def _tiny():
    spec = importlib.util.spec_from_file_location(
        "tiny_model", Path(__file__).parents[1] / "train" / "tiny_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_model"] = module
    spec.loader.exec_module(module)
    return module


tiny = _tiny()
FAST = ("--steps", "4", "--batch", "4", "--rank", "4", "--held-back", "0.2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.write_tiny_model(tmp_path_factory.mktemp("tune") / "tiny"))


@pytest.fixture
def data(tmp_path) -> str:
    return str(tiny.write_data(tmp_path / "data.jsonl"))


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("BISE_THREADS", "1")


def test_a_model_is_tuned_merged_exported_and_answers(cli, one_thread, model, data, tmp_path):
    adapter, merged, file = (str(tmp_path / name) for name in ("adapter", "merged", "merged.gguf"))
    made = cli("tune", model, data, "--out", adapter, "--keep-epochs", "1", *FAST)
    assert made.code == 0, made.err
    assert "parity  engine and trainer differ by" in made.out
    assert f"try: bise chat {model} --adapter {adapter}" in made.err
    assert {path.name for path in Path(adapter).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "loss.svg", "metrics.csv", "training.json",
        "checkpoints",
    }  # fmt: skip
    assert (Path(adapter) / "loss.svg").read_text().startswith("<svg")
    assert len((Path(adapter) / "metrics.csv").read_text().splitlines()) == 5
    (last,) = (Path(adapter) / "checkpoints").iterdir()
    assert last.name == "step-00000004"
    assert cli("chat", model, "--adapter", str(last), "-m", "Hi", "-n", "2", "--quant", "none").code == 0
    ask = ("-p", "What is 3 plus 3?", "-n", "6", "--temperature", "0", "--json", "--quant", "none")
    tuned = json.loads(cli("generate", model, "--adapter", adapter, *ask).out)["token_ids"]
    assert cli("tune", "merge", model, adapter, "--out", merged).code == 0
    assert json.loads(cli("generate", merged, *ask).out)["token_ids"] == tuned
    exported = cli("tune", "export", merged, "--out", file)
    assert exported.code == 0
    assert "without its window of 24 tokens" in exported.err
    assert json.loads(cli("generate", file, *ask).out)["token_ids"] == tuned
    again = cli("tune", "export", merged, "--out", file)
    assert (again.code, again.error_lines) == (
        2, [f"bise: error: {file} exists; name another --out or remove it"],
    )  # fmt: skip


def test_json_tells_every_event_and_the_result(cli, one_thread, model, data, tmp_path):
    result = cli("tune", model, data, "--out", str(tmp_path / "a"), "--json", *FAST)
    events = [json.loads(line) for line in result.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1], kinds.count("step")) == ("started", "finished", 4)
    assert events[-1]["parity"] < 1e-3
    step = next(event for event in events if event["event"] == "step")
    assert {"loss", "lr", "tokens_per_s", "eta_s", "memory_bytes"} <= step.keys()


def test_check_reports_every_bad_line_and_refuses_nothing_else(cli, model, data, tmp_path):
    good = cli("tune", "check", data, "--model", model)
    assert good.code == 0
    assert "12 chat" in good.out
    assert "from a step timed now" in good.out
    assert "no bad lines" in good.out
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(data).read_text() + "x\n" + '{"text": 5}\n')
    report = cli("tune", "check", str(bad), "--model", model)
    assert report.code == 2
    assert "bad: line 13: " in report.out
    assert "bad: line 14: text must be a string, not an integer" in report.out
    assert "2 bad lines" in report.out
    as_json = json.loads(cli("tune", "check", str(bad), "--model", model, "--json").out)
    assert [entry["line"] for entry in as_json["bad"]] == [13, 14]
    refused = cli("tune", model, str(bad), "--out", str(tmp_path / "a"))
    assert refused.code == 2
    assert len(refused.error_lines) == 1
    assert "line 13" in refused.error_lines[0]
    assert not (tmp_path / "a.run").exists()


@pytest.mark.timeout(300)
def test_a_run_that_is_interrupted_says_how_to_go_on_and_does(home, model, data, tmp_path):
    out = tmp_path / "adapter"
    command = [
        sys.executable, "-m", "bise", "tune", model, data, "--out", str(out), "--json", "--steps", "400",
        "--batch", "2", "--rank", "4",
    ]  # fmt: skip
    environment = os.environ | {"BISE_HOME": str(home), "BISE_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        complaint = process.stderr.read()
    assert process.returncode == 130
    assert complaint.strip() == (f"stopped; the same command with --resume goes on (checkpoint in {out}.run)")
    assert not out.exists()
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, env=environment, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "0"), "--rank must be from 1"),
        (("--targets", "wq,head"), "'head' cannot be adapted"),
        (("--lr", "0"), "lr must be from"),
        (("--epochs", "-1"), "epochs must be from"),
        (("--method", "dpo"), "no preference pairs"),
        (("--method", "full", "--base", "q4"), "cannot be trained in few bits"),
        (("--max-tokens", "5"), "are longer than 5 tokens, the first in line 1"),
        (("--max-tokens", "100000"), "the model's context of 128"),
        (("--resume",), "to resume"),
        (("--validation", "/nowhere.jsonl"), "/nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words, cli, one_thread, model, data, tmp_path):
    result = cli("tune", model, data, "--out", str(tmp_path / "a"), *options)
    assert result.code == 2
    (line,) = result.error_lines
    assert words in line


def test_without_torch_the_way_out_is_named_and_export_works(cli, model, data, tmp_path, monkeypatch):
    from bise.cli import tune

    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    refused = cli("tune", model, data, "--out", str(tmp_path / "a"))
    assert refused.code == 2
    assert "pip install 'bise[torch]'" in refused.error_lines[0]
    assert cli("tune", "export", model, "--out", str(tmp_path / "m.gguf")).code == 0


def test_a_run_that_another_of_its_processes_was_told_to_stop_says_how_to_go_on(
    cli, model, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("bise.train.job.run_job", lambda *_, **__: None)  # no signal came here
    ended = cli("tune", model, data, "--out", str(tmp_path / "adapter"))
    assert ended.code == 128 + signal.SIGTERM
    assert "the same command with --resume goes on" in ended.err
