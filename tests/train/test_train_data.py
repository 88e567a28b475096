"""What a data file may hold, and that every fault is one clear line."""

from __future__ import annotations

import json

import pytest

from bise.engine.load import load_text
from bise.errors import UserError
from bise.hub.embedded import embedded_path
from bise.model.checkpoint import open_model
from bise.text.mistral_template import MistralTemplate
from bise.text.turns import assistant_texts
from bise.train.data import histogram, read_data, truncated


@pytest.fixture(scope="module")
def text():
    return load_text(open_model(embedded_path()))


def user(content="hi"):
    return {"role": "user", "content": content}


def said(content="yes", **more):
    return {"role": "assistant", "content": content, **more}


GOOD = {"messages": [user(), said()]}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}

BAD = {
    "an empty file": ("", 0, ""),
    "blank lines only": ("\n  \n", 0, ""),
    "no JSON": ("hello", 1, ""),
    "cut JSON": ('{"messages": [', 1, ""),
    "an array": ("[1]", 1, ""),
    "a string": ('"text"', 1, ""),
    "no known key": ('{"prompt": "a", "completion": "b"}', 1, ""),
    "no key": ("{}", 1, ""),
    "both forms": ('{"messages": [], "text": "a"}', 1, ""),
    "a key twice": ('{"text": "a", "text": "b"}', 1, ""),
    "NaN": ('{"text": NaN}', 1, ""),
    "half a surrogate": (r'{"text": "\ud800"}', 1, ""),
    "bytes that are no UTF-8": (b'{"text": "\xff"}', 1, ""),
    "deep nesting": ("[" * 100 + "]" * 100, 1, ""),
    "text of another type": ({"text": 3}, 1, "text"),
    "empty text": ({"text": ""}, 1, "text"),
    "messages of another type": ({"messages": "hi"}, 1, "messages"),
    "no messages": ({"messages": []}, 1, "messages"),
    "a message of another type": ({"messages": ["hi"]}, 1, "messages[0]"),
    "an unknown role": ({"messages": [user(), {"role": "bot", "content": "x"}]}, 1, "messages[1].role"),
    "no role": ({"messages": [{"content": "x"}, said()]}, 1, "messages[0].role"),
    "an unknown key": ({"messages": [user() | {"from": "me"}, said()]}, 1, "messages[0].from"),
    "an image": ({"messages": [user([{"type": "image_url"}]), said()]}, 1, "messages[0].content[0].type"),
    "content of another type": ({"messages": [user(5), said()]}, 1, "messages[0].content"),
    "no assistant": ({"messages": [user()]}, 1, "messages"),
    "a question at the end": ({"messages": [user(), said(), user()]}, 1, "messages[2].role"),
    "an assistant at the start": ({"messages": [said(), user(), said()]}, 1, "messages[0].role"),
    "two answers in a row": ({"messages": [user(), said(), said()]}, 1, "messages[2].role"),
    "an empty answer": ({"messages": [user(), said("")]}, 1, "messages[1]"),
    "a continued answer": ({"messages": [user(), said(prefix=True)]}, 1, "messages[1].prefix"),
    "a weight of a half": ({"messages": [user(), said(weight=0.5)]}, 1, "messages[1].weight"),
    "nothing with a weight": ({"messages": [user(), said(weight=0)]}, 1, "messages"),
    "tools of another type": ({"messages": [user(), said()], "tools": 5}, 1, "tools"),
    "a tool without a name": ({"messages": [user(), said()], "tools": [{"function": {}}]},
                            1, "tools[0].function.name"),
    "a document over several lines": (json.dumps([GOOD, GOOD], indent=1), 0, ""),
    "tables of a spreadsheet": ("question,answer", 1, ""),
    "calls side by side of another type": ({"messages": [user(), said()], "parallel_tool_calls": "no"},
                                           1, "parallel_tool_calls"),
    "a fault inside of a prompt": ({"prompt": [{"role": "bot", "content": "x"}], "chosen": [said("a")],
                                    "rejected": [said("b")]}, 1, "prompt[0].role"),
    "a fault inside of OpenAI's prompt": ({"input": {"messages": [user(3)]}, "preferred_output": [said("a")],
                                           "non_preferred_output": [said("b")]},
                                          1, "input.messages[0].content"),
    "an answer of two messages": ({"prompt": "a", "chosen": [said("a"), user()], "rejected": "b"},
                                  1, "chosen"),
    "preferences over different prompts": ({"chosen": [user("a"), said("x")],
                                            "rejected": [user("b"), said("y")]}, 1, "rejected"),
    "preferences without any prompt": ({"chosen": [said("x")], "rejected": [said("y")]}, 1, "chosen"),
    "equal preferences": ({"prompt": [user()], "chosen": [said()], "rejected": [said()]}, 1, "rejected"),
    "a preference for nobody's answer": ({"prompt": [user(), said()], "chosen": [said("a")],
                                         "rejected": [said("b")]}, 1, "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_with_field_and_reason(name, text, tmp_path):
    content, line, field = BAD[name]
    path = tmp_path / "bad.jsonl"
    raw = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    file = read_data(path, *text)
    assert [(bad.line, bad.field) for bad in file.bad] == [(line, field)]
    with pytest.raises(UserError) as caught:
        file.require_good()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (f"line {line}: " in str(caught.value)) == (line > 0)


def test_every_bad_line_is_found_and_the_good_ones_are_read(text, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        "\n".join([json.dumps(GOOD), "x", json.dumps({"text": "a b"}), "y", json.dumps(GOOD), ""])
    )
    file = read_data(path, *text)
    assert [bad.line for bad in file.bad] == [2, 4]
    assert file.kinds == {"chat": 2, "text": 1}
    assert file.duplicates == ((5, 1),)


def test_pairs_and_chats_do_not_mix(text, tmp_path):
    pair = {"prompt": [user()], "chosen": [said("a")], "rejected": [said("b")]}
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(pair))
    assert [bad.line for bad in read_data(path, *text).bad] == [2]


OPENAI_PAIR = {
    "input": {"messages": [user("Hi")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [said("Yes?")],
    "non_preferred_output": [said("No!")],
}


@pytest.mark.parametrize(
    "row",
    [
        OPENAI_PAIR,
        {"prompt": "Hi", "chosen": "Yes?", "rejected": "No!"},
        {"prompt": [user("Hi")], "chosen": [said("Yes?")], "rejected": [said("No!")]},
        {"prompt": "Hi", "chosen": [user("Hi"), said("Yes?")], "rejected": [user("Hi"), said("No!")]},
        {"chosen": [user("Hi"), said("Yes?")], "rejected": [user("Hi"), said("No!")]},
    ],
)  # fmt: skip
def test_every_form_of_a_preference_is_the_same_pair(row, text, tmp_path):
    tokenizer, template = text
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    file = read_data(path, *text)
    assert file.bad == ()
    prompt, end = tuple(template.encode([user("Hi")])), tokenizer.control_id("</s>")
    for found, answer in zip(file.examples[0].texts, ("Yes?", "No!"), strict=True):
        assert found.ids == (*prompt, *tokenizer.encode(answer), end)
        assert found.learned == (False,) * len(prompt) + (True,) * (len(found.ids) - len(prompt))


def test_a_mark_in_front_of_the_file_and_empty_tools_change_nothing(text, tmp_path):
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text(json.dumps(GOOD))
    marked.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD | {"tools": [], "parallel_tool_calls": False}).encode()
    )
    assert read_data(marked, *text).texts == read_data(plain, *text).texts


def test_only_the_assistants_turns_are_learned(text):
    tokenizer, template = text
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        said("Hello."),
        user("Bye"),
        said("See you."),
    ]
    (found,) = assistant_texts(template, tokenizer, messages)
    learned = [token for token, counts in zip(found.ids, found.learned, strict=True) if counts]
    end = tokenizer.control_id("</s>")
    assert learned == [*tokenizer.encode("Hello."), end, *tokenizer.encode("See you."), end]
    assert found.ids[: len(template.encode(messages[:-1]))] == tuple(template.encode(messages[:-1]))


def test_a_turn_with_weight_zero_is_shown_and_not_learned(text, tmp_path):
    tokenizer, _ = text
    path = tmp_path / "weights.jsonl"
    path.write_text(json.dumps({"messages": [user(), said("no", weight=0), user(), said("yes", weight=1)]}))
    (found,) = read_data(path, *text).texts
    learned = [token for token, counts in zip(found.ids, found.learned, strict=True) if counts]
    assert learned == [*tokenizer.encode("yes"), tokenizer.control_id("</s>")]


def test_a_format_that_moves_the_system_prompt_gives_a_text_per_prompt(text):
    tokenizer, _ = text
    template = MistralTemplate(tokenizer, "v3")
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Hi"),
        said("Hello."),
        user("Bye"),
        said("Go."),
    ]
    first, second = assistant_texts(template, tokenizer, messages)
    end = tokenizer.control_id("</s>")
    assert first.ids == (*template.encode(messages[:2]), *tokenizer.encode("Hello."), end)
    assert second.ids == (*template.encode(messages[:4]), *tokenizer.encode("Go."), end)
    assert sum(second.learned) == len(tokenizer.encode("Go.")) + 1


def test_long_texts_are_counted_and_cut_only_when_asked(text, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps({"text": "one two three four five six seven"}) + "\n" + json.dumps({"text": "hi there"})
    )
    texts = read_data(path, *text).texts
    cut, count = truncated(texts, 5)
    assert count == 1
    assert max(len(item.ids) for item in cut) == 5
    assert histogram([3, 16, 17, 40]) == [(16, 2), (32, 1), (64, 1)]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_calls_of_tools_are_learned_and_their_results_are_not(text, tmp_path):
    tokenizer, template = text
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Genf"}'},
    }
    messages = [
        user("How is it in Genf?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "windy"},
        said("It blows."),
    ]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": [TOOL]}))
    file = read_data(path, tokenizer, template)
    assert file.bad == ()
    learned = "".join(
        tokenizer.decode([token for token, counts in zip(found.ids, found.learned, strict=True) if counts])
        for found in file.texts
    )
    assert "weather" in learned
    assert "Genf" in learned
    assert "It blows." in learned
    assert "windy" not in learned
    assert "How is it" not in learned
    shown = "".join(tokenizer.decode(found.ids) for found in file.texts)
    assert "windy" in shown
    assert shown.count("properties") >= 1
