"""`bise generate --receipt` and `bise replay`, with the embedded model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("bise._native", reason="the native extension is not built")

ASK = ("generate", "-p", "Once upon a time", "-n", "10", "--seed", "3", "--threads", "1")


@pytest.fixture
def receipt(cli, home, tmp_path):
    path = tmp_path / "receipt.json"
    assert cli(*ASK, "--receipt", str(path)).code == 0
    return path


def test_a_receipt_is_confirmed_in_one_line_with_any_number_of_threads(cli, receipt):
    result = cli("replay", str(receipt), "--threads", "2")
    assert (result.code, result.out) == (
        0,
        "same: 10 tokens, log-probs included, bit for bit (brise)\n",
    )


def test_a_changed_parameter_is_found_out(cli, receipt):
    value = json.loads(receipt.read_text())
    value["params"]["seed"] = 4
    receipt.write_text(json.dumps(value))
    result = cli("replay", str(receipt))
    assert result.code == 1
    assert result.out.startswith("different: the output differs at token ")
    assert result.error_lines == []


def test_a_name_in_the_receipt_does_not_rename_the_model_that_ran(cli, receipt):
    value = json.loads(receipt.read_text())
    value["model"]["name"] = "another"
    receipt.write_text(json.dumps(value))
    result = cli("replay", str(receipt), "--threads", "2")
    assert result.out == "same: 10 tokens, log-probs included, bit for bit (brise)\n"


def test_another_model_is_told_before_anything_runs(cli, receipt):
    value = json.loads(receipt.read_text())
    value["model"] |= {"name": "mistral", "weights_sha256": "ab" * 32}
    receipt.write_text(json.dumps(value))
    result = cli("replay", str(receipt))
    assert result.code == 1
    assert result.out.startswith("different: the model's weights differ: SHA-256 abababababab... in the")
    assert "--model" in result.err


def test_a_prompt_left_out_is_asked_for_and_taken(cli, home, tmp_path):
    path = tmp_path / "receipt.json"
    assert cli(*ASK, "--receipt", str(path), "--receipt-without-prompt").code == 0
    refused = cli("replay", str(path))
    assert refused.code == 2
    assert "--prompt" in refused.error_lines[0]
    assert cli("replay", str(path), "--prompt", "Once upon a time").code == 0


def test_a_receipt_that_could_not_be_written_is_refused_before_any_work(cli, home, tmp_path):
    path = tmp_path / "there.json"
    path.write_text("{}")
    for options, words in (
        (("--receipt", str(path)), "exists"),
        (("--receipt", str(tmp_path / "none" / "r.json")), "no such folder"),
        (("--receipt-without-prompt",), "needs --receipt"),
    ):
        result = cli(*ASK, *options)
        assert (result.code, result.out) == (2, "")
        assert words in result.error_lines[0]


def test_an_output_that_a_schema_held_is_confirmed_with_and_without_its_schema_in_the_receipt(
    cli, home, tmp_path
):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"word": {"type": "string"}}}))
    ask = (*ASK[:-4], "--threads", "1", "-n", "30", "--json-schema", str(schema))
    whole, bare = tmp_path / "whole.json", tmp_path / "bare.json"
    assert cli(*ask, "--receipt", str(whole)).code == 0
    assert cli("replay", str(whole)).out.startswith("same: ")
    assert cli(*ask, "--receipt", str(bare), "--receipt-without-prompt").code == 0
    assert "word" not in bare.read_text()
    given = ("replay", str(bare), "--prompt", "Once upon a time")
    assert cli(*given, "--json-schema", str(schema)).out.startswith("same: ")
    assert "made without its grammar" in cli(*given).error_lines[0]
    schema.write_text("true")
    assert "not the one" in cli(*given, "--json-schema", str(schema)).error_lines[0]
