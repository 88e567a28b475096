from __future__ import annotations

import json

import pytest

from bise.cli.repl import read_message


def test_one_message_gets_one_answer(cli, fake, model_dir):
    result = cli("chat", str(model_dir), "--message", "hi")
    assert (result.code, result.out) == (0, "echo: hi\n")
    assert result.err.startswith("fake-1: mistral, 0.1 million parameters, context 200, licence Apache-2.0")


def test_piped_lines_are_answered_in_turn_as_one_conversation(cli, fake, model_dir):
    result = cli("chat", str(model_dir), stdin=b"one\r\n\ntwo")
    assert result.out == "echo: one\necho: two\n"
    second = fake.engine.requests[1].token_ids
    assert bytes(i - 3 for i in second if 3 <= i < 259) == b"oneecho: onetwo"


def test_json_prints_one_object_per_line(cli, fake, model_dir):
    result = cli("chat", str(model_dir), "--json", "--seed", "3", stdin=b"a\nb\n")
    first, second = (json.loads(line) for line in result.out.splitlines())
    assert (first["role"], first["content"], second["content"]) == ("assistant", "echo: a", "echo: b")
    assert first["seed"] == 3
    assert first["finish_reason"] == "stop"


def test_the_system_prompt_comes_first(cli, fake, model_dir):
    cli("chat", str(model_dir), "--system", "be brief", "-m", "hi")
    assert fake.engine.requests[0].token_ids[:2] == (1, 302)


def test_a_reset_forgets_the_turns_and_keeps_the_system_prompt(cli, fake, model_dir):
    cli("chat", str(model_dir), "--system", "S", stdin=b"one\n/reset\ntwo\n")
    assert bytes(i - 3 for i in fake.engine.requests[1].token_ids if 3 <= i < 259) == b"Stwo"


def test_exit_ends_a_pipe_early(cli, fake, model_dir):
    result = cli("chat", str(model_dir), stdin=b"one\n/exit\ntwo\n")
    assert (result.code, result.out) == (0, "echo: one\n")


def test_a_line_with_a_space_before_the_slash_is_text(cli, fake, model_dir):
    assert cli("chat", str(model_dir), stdin=b" /etc\n").out == "echo:  /etc\n"


def test_an_unknown_command_in_a_pipe_is_a_mistake_with_its_line(cli, fake, model_dir):
    result = cli("chat", str(model_dir), stdin=b"one\n/rest\n")
    assert result.code == 2
    assert result.error_lines == [
        "bise: error: line 2 of standard input: there is no /rest; /help lists the commands, "
        "a space before the slash sends it as text"
    ]


def test_bad_bytes_in_a_pipe_are_a_mistake_with_their_line(cli, fake, model_dir):
    result = cli("chat", str(model_dir), stdin=b"one\n\xff\n")
    assert result.code == 2
    assert "line 2 of standard input is not UTF-8" in result.err


def test_a_conversation_that_outgrows_the_context_is_refused_with_numbers_and_the_way_out(
    cli, fake, model_dir
):
    line = b"x" * 60 + b"\n"
    result = cli("chat", str(model_dir), stdin=line * 3)
    assert result.code == 2
    assert "line 2" in result.err or "line 3" in result.err
    assert "context of 200" in result.err
    assert "/reset starts afresh" in result.err


def test_a_cut_answer_is_said_to_be_cut(cli, fake, model_dir):
    result = cli("chat", str(model_dir), "-m", "abcdef", "-n", "3")
    assert result.out == "ech\n"
    assert "(cut off after 3 tokens: --max-tokens)" in result.err


def test_a_model_without_a_template_points_to_generate(cli, fake, model_dir):
    fake.template = None
    result = cli("chat", str(model_dir), "-m", "hi")
    assert result.code == 2
    assert result.error_lines == [
        "bise: error: fake-1 has no chat template (a base model?); use `bise generate --prompt TEXT`"
    ]


def test_a_saved_conversation_goes_on_after_loading(cli, fake, model_dir, home):
    cli("chat", str(model_dir), "--system", "S", stdin=b"one\n/save talk\n")
    saved = json.loads((home / "chats" / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert oct((home / "chats").stat().st_mode)[-3:] == "700"
    cli("chat", str(model_dir), stdin=b"/load talk\ntwo\n")
    assert bytes(i - 3 for i in fake.engine.requests[1].token_ids if 3 <= i < 259) == b"Soneecho: onetwo"


def test_saving_never_overwrites_a_file_of_another_session(cli, fake, model_dir, home):
    cli("chat", str(model_dir), stdin=b"one\n/save talk\n")
    before = (home / "chats" / "talk.json").read_bytes()
    result = cli("chat", str(model_dir), stdin=b"two\n/save talk\n")
    assert result.code == 2
    assert "exists" in result.err
    assert (home / "chats" / "talk.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("nope", "is not JSON"),
        ("[]", 'an object with "messages" expected'),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "message 1 has role 'wizard'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has no text in content"),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "'name', which is not supported"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(cli, fake, model_dir, tmp_path, content, reason):
    path = tmp_path / "chat.json"
    path.write_text(content)
    result = cli("chat", str(model_dir), stdin=f"/load {path}\n".encode())
    assert result.code == 2
    assert reason in result.err
    assert str(path) in result.err


def test_an_interrupted_answer_stays_in_the_conversation(fake, home, monkeypatch, capfd):
    from bise.cli import repl
    from bise.engine.request import SamplingParams

    chat = repl.Chat(fake, SamplingParams())
    lines = iter(["hello", "next"])

    def read_line(continued):
        line = next(lines, None)
        if line is None:
            raise EOFError
        fake.engine.interrupt_after = 4 if line == "hello" else None
        return line

    monkeypatch.setattr(repl, "_prompt", read_line)
    repl.run_terminal(chat, keep_history=False)
    captured = capfd.readouterr()
    assert captured.out == "echo\necho: next\n"
    assert "(stopped)" in captured.err
    assert [turn["content"] for turn in chat.transcript.turns] == ["hello", "echo", "next", "echo: next"]


def test_at_the_terminal_an_error_is_told_and_the_talk_goes_on(fake, home, monkeypatch, capfd):
    from bise.cli import repl
    from bise.engine.request import SamplingParams

    chat = repl.Chat(fake, SamplingParams())
    lines = iter(["/nope", "x" * 300, "hi"])

    def read_line(continued):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(repl, "_prompt", read_line)
    repl.run_terminal(chat, keep_history=True)
    captured = capfd.readouterr()
    assert captured.out == "echo: hi\n"
    assert "there is no /nope" in captured.err
    assert "context of 200" in captured.err
    history = home / "chat_history"
    assert oct(history.stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["one\\", "two"], "one\ntwo"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""all on one line"""'], "all on one line"),
        (["ends with two backslashes\\", ""], "ends with two backslashes\n"),
    ],
)
def test_a_message_may_span_lines(lines, message):
    feed = iter(lines)
    assert read_message(lambda continued: next(feed)) == message


def test_control_characters_of_a_model_do_not_reach_a_terminal():
    from bise.cli.output import printable

    assert printable("a\x1b[2Jb\x07\n\tc\x9bd") == "a␛[2Jb␇\n\tc�d"


def test_the_speed_line_counts_decoding_without_the_first_token(fake, home):
    from bise.cli.answer import ask, ignore_text
    from bise.engine.request import Request

    answer = ask(
        fake, Request(token_ids=(1, 300, 100, 301)), ignore_text
    )  # 7 tokens, 0.25 s prefill, 0.5 s decode
    assert answer.speed_line(200) == "7 tokens · 12.0 tok/s · first token after 0.25 s · 11 of 200 context"


def test_an_empty_answer_leaves_no_turn_behind(cli, fake, model_dir, monkeypatch):
    answers = iter([[], None])
    monkeypatch.setattr(fake.engine, "_answer", empty_first(fake.engine, answers))
    result = cli("chat", str(model_dir), stdin=b"one\ntwo\n")
    assert "(no answer; the question is not kept)" in result.err
    assert result.out == "\necho: two\n"
    assert bytes(i - 3 for i in fake.engine.requests[1].token_ids if 3 <= i < 259) == b"two"


def empty_first(engine, answers):
    real = engine._answer

    def answer(request, room):
        deltas = real(request, room)
        return deltas[-1:] if next(answers) == [] else deltas

    return answer
