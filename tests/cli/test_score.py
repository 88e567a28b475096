from __future__ import annotations

import json
import math

import pytest

USER_A, ASSISTANT_B = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture
def rows(tmp_path):
    def write(*rows: object) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write


def logprob(token: int) -> float:
    return -math.log(2 + token % 2)


def test_a_text_gets_ids_logprobs_and_perplexity(cli, fake, model_dir, rows):
    result = cli("score", str(model_dir), rows({"text": "ab"}), "--json")
    value = json.loads(result.out)
    assert value["token_ids"] == [1, 100, 101]
    assert value["logprobs"] == [None, logprob(100), logprob(101)]
    assert value["perplexity"] == pytest.approx(math.sqrt(2 * 3), rel=1e-12)


def test_rows_come_out_in_the_order_of_the_file(cli, fake, model_dir, rows):
    texts = [str(i) for i in range(40)]
    result = cli("score", str(model_dir), rows(*({"text": text} for text in texts)), "--json")
    ids = [json.loads(line)["token_ids"] for line in result.out.splitlines()]
    assert [bytes(i - 3 for i in row[1:]).decode() for row in ids] == texts


def test_a_chat_counts_the_assistants_turns_and_their_ends_only(cli, fake, model_dir, rows):
    messages = [
        {"role": "system", "content": "s"},
        USER_A,
        ASSISTANT_B,
        USER_A,
        {"role": "assistant", "content": "cc"},
    ]
    value = json.loads(cli("score", str(model_dir), rows({"messages": messages}), "--json").out)
    assert value["token_ids"] == [1, 302, 118, 300, 100, 301, 101, 2, 300, 100, 301, 102, 102, 2]
    counted = [101, 2, 102, 102, 2]
    expected = math.exp(-sum(logprob(i) for i in counted) / len(counted))
    assert value["perplexity"] == pytest.approx(expected, rel=1e-12)
    assert value["counted_tokens"] == 5


def test_turns_after_the_last_answer_are_not_scored(cli, fake, model_dir, rows):
    value = json.loads(
        cli("score", str(model_dir), rows({"messages": [USER_A, ASSISTANT_B, USER_A]}), "--json").out
    )
    assert value["token_ids"] == [1, 300, 100, 301, 101, 2]


def test_a_format_that_rewrites_earlier_turns_is_refused_by_row(cli, fake, model_dir, rows):
    fake.template.moves_system = True
    messages = [{"role": "system", "content": "s"}, USER_A, ASSISTANT_B, USER_A, ASSISTANT_B]
    result = cli("score", str(model_dir), rows({"text": "ok"}, {"messages": messages}), "--json")
    assert result.code == 2
    assert result.out == ""
    assert "line 2: messages[4]: this model's chat format rewrites earlier turns" in result.err


def test_bad_lines_are_named_by_number_and_nothing_is_scored(cli, fake, model_dir, rows):
    path = rows(
        {"text": "a"}, "{", "", {"text": 3}, {}, {"text": "a", "messages": []}, "[1]", '{"messages": [{}]}'
    )
    result = cli("score", str(model_dir), path, "--json")
    assert result.code == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    for number in (2, 4, 5, 6, 7):
        assert f"line {number}: " in result.err
    assert "and 1 more" in result.err
    assert not fake.engine.requests


def test_a_row_longer_than_the_context_is_refused(cli, fake, model_dir, rows):
    result = cli("score", str(model_dir), rows({"text": "a" * 300}), "--json")
    assert result.code == 2
    assert "line 1: 301 tokens exceed the context of 200" in result.err


def test_a_single_token_has_no_perplexity(cli, fake, model_dir, rows):
    value = json.loads(cli("score", str(model_dir), rows({"text": ""}), "--json").out)
    assert value == {"token_ids": [1], "logprobs": [None], "perplexity": None, "counted_tokens": 0}


def test_without_json_a_table_is_printed(cli, fake, model_dir, rows):
    result = cli("score", str(model_dir), rows({"text": "ab"}, {"text": ""}, {"text": "ab"}))
    header, line, empty, _, total = result.out.splitlines()
    assert header.split() == ["ROW", "TOKENS", "COUNTED", "PERPLEXITY"]
    assert line.split() == ["1", "3", "2", "2.449"]
    assert empty.split() == ["2", "1", "0", "-"]
    assert total.split() == ["all", "7", "4", "2.449"]


@pytest.mark.parametrize("name", ["/no/such.jsonl", "/dev/zero", "/"])
def test_a_file_that_cannot_be_read_is_a_mistake(cli, fake, model_dir, name):
    result = cli("score", str(model_dir), name, "--json")
    assert result.code == 2
    assert result.err.startswith(f"bise: error: {name}: ")
    assert len(result.err.splitlines()) == 1


def test_an_empty_file_is_a_mistake(cli, fake, model_dir, rows):
    assert "no rows to score" in cli("score", str(model_dir), rows(""), "--json").err
