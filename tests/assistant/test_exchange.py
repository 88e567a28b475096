"""Exports and imports: all branches survive, foreign forms are read, what is skipped is told."""

from __future__ import annotations

import io
import itertools
import json
import re
import tracemalloc

import pytest
from sqlalchemy import text

from bise.assistant.conversations import Conversations
from bise.assistant.documents import Documents
from bise.assistant.exchange import as_json, as_markdown, import_file
from bise.assistant.export_file import PIECE, entries
from bise.assistant.messages import Messages
from bise.assistant.reader import ReadText
from bise.assistant.storage import Memory
from bise.errors import RequestError

CHATGPT = [
    {
        "title": "Winds",
        "create_time": 1700000000.0,
        "current_node": "c",
        "mapping": {
            "root": {"parent": None, "message": None},
            "a": {"parent": "root", "message": {"author": {"role": "system"}, "content": {"parts": [""]}}},
            "b": {"parent": "a", "message": {"author": {"role": "user"}, "content": {"parts": ["Hi"]}}},
            "c": {
                "parent": "b",
                "message": {
                    "author": {"role": "assistant"},
                    "content": {"parts": ["Hello", {"image": 1}]},
                    "metadata": {"model_slug": "gpt-x"},
                },
            },
            "d": {"parent": "b", "message": {"author": {"role": "assistant"}, "content": {"parts": ["Hey"]}}},
        },
    }
]
OPEN_WEBUI = [
    {
        "title": "Winds",
        "chat": {
            "history": {
                "currentId": "c",
                "messages": {
                    "b": {"parentId": None, "role": "user", "content": "Hi", "timestamp": 1700000000},
                    "c": {"parentId": "b", "role": "assistant", "content": "Hello", "model": "m"},
                    "d": {"parentId": "b", "role": "assistant", "content": "Hey"},
                },
            }
        },
    }
]
LIBRECHAT = {
    "conversationId": "x",
    "title": "Winds",
    "recursive": True,
    "messages": [
        {
            "messageId": "b",
            "isCreatedByUser": True,
            "text": "Hi",
            "children": [
                {"messageId": "d", "text": "Hey", "createdAt": "2024-01-01T10:00:00Z"},
                {"messageId": "c", "content": [{"type": "text", "text": "Hello"}]},
            ],
        }
    ],
}


DEEP = json.loads("[" * 300 + "]" * 300)


def imported(document, storage=None):
    storage = storage or Memory()
    report = import_file(storage, "ana", io.BytesIO(json.dumps(document).encode()))
    conversations = Conversations(storage).listing("ana")
    return report, conversations, Messages(storage)


@pytest.mark.parametrize(
    "document", [CHATGPT, OPEN_WEBUI, LIBRECHAT], ids=["chatgpt", "open-webui", "librechat"]
)
def test_a_foreign_export_keeps_its_branches_and_the_one_on_screen(document):
    report, (conversation,), messages = imported(document)
    assert (report.conversations, report.messages, report.skipped) == (1, 3, [])
    assert conversation.title == "Winds"
    branch = messages.branch("ana", conversation.id)
    assert [(message.role, message.text) for message in branch] == [("user", "Hi"), ("assistant", "Hello")]
    assert len(branch[1].siblings) == 2


def test_what_goes_out_comes_back_the_same():
    _, (conversation,), messages = imported(CHATGPT)
    out = as_json(conversation, messages.all("ana", conversation.id))
    report, (again,), copies = imported(out)
    assert report.messages == 3
    assert as_markdown(again, copies.branch("ana", again.id)) == as_markdown(
        conversation, messages.branch("ana", conversation.id)
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (7, "is no object"),
        ({"title": "T", "other": 1}, "conversation 2 \\('T'\\): is of no known form"),
        ({"title": "T", "mapping": {"a": 7}}, "mapping.a is no object"),
        ({"format": "bise-conversation-1", "messages": [{"id": "a", "role": "robot"}]}, "role is 'robot'"),
        ({"format": "bise-conversation-1", "messages": {}}, "messages is no list"),
        ({"format": "bise-conversation-1", "messages": [{"role": "user"}]}, "has no id"),
        ({"conversationId": "c", "messages": [{"text": "x"}]}, "no messageId"),
        ({"conv": {}, "messages": [{"id": 1, "role": "user", "content": "x"}] * 2}, "have the same id"),
        ({"chat": {"history": {"messages": {"a": {"role": 3}}}}}, "role is 3"),
        (
            {"format": "bise-conversation-1", "messages": [{"id": "a", "role": "user", "parts": [DEEP]}]},
            "deeply",
        ),
    ],
)
def test_one_bad_conversation_is_named_and_the_others_are_kept(bad, reason):
    storage = Memory()
    report, kept, _ = imported([*CHATGPT, bad, *CHATGPT], storage)
    assert (report.conversations, report.num_skipped, len(kept)) == (2, 1, 2)
    assert re.search(reason, report.skipped[0])
    assert report.skipped[0].startswith("conversation 2 ")
    assert "\n" not in report.skipped[0]


def test_a_conversation_that_cannot_be_stored_leaves_nothing_of_itself():
    storage = Memory()
    bad = {"format": "bise-conversation-1", "title": "T", "params": {"temperature": 99},
           "messages": [{"id": "a", "role": "user", "text": "x"}]}  # fmt: skip
    with pytest.raises(RequestError, match=r"conversation 1 .*temperature.*nothing was imported"):
        imported(bad, storage)
    assert Conversations(storage).listing("ana") == []
    with storage.reading() as session:
        assert session.execute(text("SELECT count(*) FROM message_search")).scalar() == 0


def test_a_file_that_breaks_off_keeps_what_came_before_and_says_where():
    whole = json.dumps([*CHATGPT, *CHATGPT, *CHATGPT]).encode()
    for cut in (len(whole) - 1, len(whole) - 40):
        storage = Memory()
        report = import_file(storage, "ana", io.BytesIO(whole[:cut]))
        assert report.conversations == (3 if cut == len(whole) - 1 else 2)
        assert f"after conversation {report.conversations}: the file is no JSON" in report.skipped[-1]


def test_many_bad_conversations_are_told_by_number_and_the_first_of_them_by_name():
    report, _, _ = imported([*CHATGPT, *[{"title": "T"}] * 250])
    assert (report.num_skipped, len(report.skipped)) == (250, 100)


def test_what_a_model_did_on_the_way_to_an_answer_that_is_missing_is_counted():
    nodes = dict(
        [
            chatgpt_node("q", None, "user", "text", {"parts": ["How far?"]}),
            chatgpt_node("t", "q", "assistant", "thoughts", {"thoughts": [{"summary": "Hm", "content": ""}]}),
        ]
    )
    report, _, _ = imported({"title": "T", "mapping": nodes, "current_node": "t"})
    assert (report.messages, report.left_out) == (1, {"steps without an answer": 1})


def test_a_message_that_was_a_picture_alone_says_so():
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "x"}
    nodes = dict([chatgpt_node("q", None, "user", "multimodal_text", {"parts": [picture]})])
    report, (conversation,), messages = imported({"title": "T", "mapping": nodes})
    assert report.left_out == {"pictures": 1}
    assert [message.text for message in messages.branch("ana", conversation.id)] == ["[picture]"]


class Slowly(io.RawIOBase):
    """A file of many conversations that is never whole in memory; counts what was read of it."""

    def __init__(self, pieces):
        self.pieces, self.rest, self.num_read = pieces, b"", 0

    def read(self, size=-1):
        while len(self.rest) < size and (piece := next(self.pieces, None)) is not None:
            self.rest += piece
        found, self.rest = self.rest[:size], self.rest[size:]
        self.num_read += len(found)
        return found

    def seek(self, place, whence=0):
        assert (place, self.num_read) == (0, 4)
        self.rest, self.num_read = b'[{"a' + self.rest, 0


def test_a_large_file_is_read_as_it_is_needed():
    entry = json.dumps({"a": "wind " * 20_000}).encode()  # 100 kB
    file = Slowly(itertools.chain([b"[" + entry], itertools.repeat(b"," + entry, 600), [b"]"]))
    tracemalloc.start()
    for number, _ in enumerate(entries(file), 1):
        assert file.num_read <= number * len(entry) + 3 * PIECE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (number, file.num_read > 60e6, peak < 12e6) == (601, True, True)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "values"),
    [
        (b'[{"a": "\\u00e9\xc3\xa9"}, 7, "x"]', [{"a": "éé"}, 7, "x"]),
        (b'{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'\xef\xbb\xbf {"conversations": [1, 23]}', [1, 23]),
        (b"[]", []),
        (b"[ ]\n[12]", [12]),
        (b'["\\ud83d\\ude00", "\\ud83d", "a\\u0000b"]', ["\U0001f600", "\ufffd", "a\ufffdb"]),
    ],
)
def test_values_are_the_same_however_the_file_is_cut(monkeypatch, size, content, values):
    monkeypatch.setattr("bise.assistant.export_file.PIECE", size)
    assert list(entries(io.BytesIO(content))) == values


@pytest.mark.parametrize(
    "content",
    [b"[1 2]", b"[1,]", b'[{"a": 1}', b'{"a": }', b'["' + b"x" * 100 + b'\n"]', b"[1", b'{"a', b"]"],
)
def test_what_is_no_json_is_refused_however_the_file_is_cut(monkeypatch, content):
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr("bise.assistant.export_file.PIECE", size)
        with pytest.raises(RequestError, match="is no JSON"):
            list(entries(io.BytesIO(content)))


def test_a_tree_of_librechat_that_is_deeper_than_a_parser_that_calls_itself_goes_is_taken_whole():
    turns = [
        json.dumps({"messageId": f"m{number}", "text": f"Turn {number}", "isCreatedByUser": number % 2 == 0})
        for number in range(2000)
    ]
    tree = "".join(turn[:-1] + ', "children": [' for turn in turns) + "]}" * len(turns)
    content = '{"conversationId": "x", "recursive": true, "messages": [' + tree + "]}"
    storage = Memory()
    report = import_file(storage, "ana", io.BytesIO(content.encode()))
    (conversation,) = Conversations(storage).listing("ana")
    branch = Messages(storage).all("ana", conversation.id)
    assert (report.messages, report.num_skipped) == (2000, 0)
    assert [message.text for message in branch] == [f"Turn {number}" for number in range(2000)]
    assert [message.parent_id for message in branch] == [None, *(message.id for message in branch[:-1])]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no json", "is no JSON"),
        (b"[]", "has no conversation"),
        (b"\xff\xfe", "is no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"\\u0000": ' * 950 + b"1" + b"}" * 950, "is of no known form"),
        (b"[" + b"1" * 5000 + b"]", "a number is too long"),
        (b'{"format": "bise-conversation-1", "params": ' + b"[" * 900 + b"]" * 900 + b"}", "too deeply"),
        (b'{"chat": {"messages": [{"role": ' + b"[" * 2000 + b"]" * 2000 + b"}]}}", "role is no text"),
        (b"PK\x03\x04 damaged", "archive is damaged"),
    ],
)
def test_a_file_of_no_known_kind_is_refused_in_one_line(content, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        import_file(Memory(), "ana", io.BytesIO(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        {"mapping": {"a": {"message": {"author": {"role": "user"}, "content": {"parts": ["Hi"]}}}}},
        {"chat": {"messages": [{"role": "user", "content": "Hi"}]}},
        {
            "chat": {
                "history": {"messages": {"a": {"role": "user", "content": [{"type": "text", "text": "Hi"}]}}}
            }
        },
        {"conversationId": None, "messages": [{"messageId": "a", "sender": "User", "text": "Hi"}]},
        {"conv": {}, "messages": [{"id": 1, "role": "user", "content": "Hi"}]},
        {"format": "bise-conversation-1", "messages": [{"id": "a", "role": "user", "text": "Hi"}]},
    ],
)
def test_missing_fields_are_no_fault(document):
    report, (conversation,), messages = imported(document)
    assert report.messages == 1
    assert [message.text for message in messages.branch("ana", conversation.id)] == ["Hi"]


def chatgpt_node(key, parent, role, kind, words, **fields):
    content = {"content_type": kind} | words
    return key, {
        "id": key, "parent": parent, "children": [],
        "message": {"id": key, "author": {"role": role, "name": fields.pop("name", None), "metadata": {}},
                    "content": content, "status": "finished_successfully", "recipient": "all",
                    "metadata": fields.pop("metadata", {}), **fields},
    }  # fmt: skip


def test_thoughts_calls_and_results_of_chatgpt_become_parts_of_the_answer():
    hidden = {"is_visually_hidden_from_conversation": True}
    about = {"user_profile": "", "user_instructions": "Be brief."}
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "x"}
    thoughts = {"thoughts": [{"summary": "Look", "content": "I look."}]}
    code = {"language": "python", "text": "1+1"}
    nodes = dict(
        [
            chatgpt_node("i", None, "user", "user_editable_context", about, metadata=hidden),
            chatgpt_node("q", "i", "user", "multimodal_text", {"parts": [picture, "What is it?"]}),
            chatgpt_node("t", "q", "assistant", "thoughts", thoughts),
            chatgpt_node("c", "t", "assistant", "code", code, recipient="python"),
            chatgpt_node("o", "c", "tool", "execution_output", {"text": "2"}, name="python"),
            chatgpt_node("r", "o", "assistant", "reasoning_recap", {"content": "Thought for 3s"}),
            chatgpt_node(
                "a", "r", "assistant", "text", {"parts": ["A cat."]}, metadata={"model_slug": "gpt-9"}
            ),
        ]
    )
    entry = {
        "title": "Cat", "create_time": 1.7e9, "update_time": 1.71e9, "mapping": nodes, "current_node": "a",
        "is_archived": False, "conversation_template_id": None,
    }  # fmt: skip
    report, (conversation,), messages = imported([entry])
    question, answer = messages.branch("ana", conversation.id)
    assert report.messages == 2
    assert (question.text, answer.text, answer.model) == ("What is it?", "A cat.", "gpt-9")
    assert [part["type"] for part in answer.parts] == ["thinking", "tool_call", "tool_result"]
    assert answer.parts[0]["text"] == "Look\nI look."
    assert answer.parts[2] == {"type": "tool_result", "name": "python", "text": "2"}
    assert (conversation.system, conversation.updated_at) == ("Be brief.", 1.71e9)


def test_reasoning_in_open_webui_and_librechat_becomes_a_part():
    content = (
        '<details type="reasoning" done="true" duration="5">\n<summary>Thought for 5 seconds</summary>\n'
        "> Hm.\n> So.\n</details>\nHello"
    )
    chat = {"chat": {"history": {"currentId": "a", "messages": {
        "s": {"role": "system", "content": "Be kind.", "parentId": None},
        "q": {"role": "user", "content": "Hi", "parentId": "s"},
        "a": {"role": "assistant", "content": content, "parentId": "q", "timestamp": 1700000000},
    }}}, "archived": True, "created_at": 1700000000, "updated_at": 1700000001}  # fmt: skip
    storage = Memory()
    imported([chat], storage)
    (conversation,) = Conversations(storage).listing("ana", archived=True)
    answer = Messages(storage).branch("ana", conversation.id)[-1]
    assert (answer.text, conversation.system) == ("Hello", "Be kind.")
    assert answer.parts == ({"type": "thinking", "text": "Hm.\nSo.", "seconds": 5.0},)
    call = {"name": "web", "args": "{}", "output": "found"}
    content = [
        {"type": "think", "think": "Hm."},
        {"type": "text", "text": {"value": "Hello"}},
        {"type": "tool_call", "tool_call": call},
    ]
    root = "00000000-0000-0000-0000-000000000000"
    libre = {
        "conversationId": "c",
        "options": {"promptPrefix": "Be kind."},
        "messages": [
            {"messageId": "q", "parentMessageId": root, "isCreatedByUser": True, "text": "Hi"},
            {"messageId": "a", "parentMessageId": "q", "isCreatedByUser": False, "content": content},
        ],
    }
    _, (conversation,), messages = imported(libre)
    answer = messages.branch("ana", conversation.id)[-1]
    assert (answer.text, [part["type"] for part in answer.parts]) == (
        "Hello", ["thinking", "tool_call", "tool_result"],
    )  # fmt: skip
    assert conversation.system == "Be kind."


def test_everything_of_a_conversation_survives_the_way_out_and_in():
    storage = Memory()
    shelf = Conversations(storage), Messages(storage), Documents(storage)
    made = shelf[0].create("ana", title="Été", system="Be kind.", params={"temperature": 0.3}, folder="F")
    shelf[0].change("ana", made.id, {"pinned": True})
    document = shelf[2].add(
        "ana", made.id, name="a.pdf", kind="pdf", read=ReadText(text="one two", pages=((1, 0),)), tokens=2
    )
    _, answer, _ = shelf[1].ask(
        "ana",
        made.id,
        text="Q",
        parent_id=None,
        client_id=None,
        model="m",
        params={},
        documents=[document.id],
    )
    source = {"number": 1, "document_id": document.id, "name": "a.pdf", "text": "one", "start": 0, "end": 3,
              "page": 1}  # fmt: skip
    usage = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 2, "cost": "0.1", "currency": "EUR"}
    fields = {"text": "A [1]", "status": "stopped", "finish_reason": "abort", "usage": usage,
              "parts": [{"type": "thinking", "text": "Hm."}], "sources": [source]}  # fmt: skip
    shelf[1].save(answer.id, fields, is_final=True)
    shelf[1].rate("ana", answer.id, 1)

    def out(conversation):
        listed = shelf[2].listing("ana", conversation.id)
        documents = [shelf[2].get("ana", conversation.id, found.id) for found in listed]
        return as_json(conversation, shelf[1].all("ana", conversation.id), documents)

    first = out(shelf[0].get("ana", made.id))
    text = json.dumps(first)
    report = import_file(storage, "ana", io.BytesIO(text.encode()))
    assert (report.conversations, report.messages) == (1, 2)
    (copy,) = [found for found in shelf[0].listing("ana") if found.id != made.id]
    second = out(copy)
    ids = [first["documents"][0]["id"], *(message["id"] for message in first["messages"])]
    news = [second["documents"][0]["id"], *(message["id"] for message in second["messages"])]
    for old, new in zip(ids, news, strict=True):
        text = text.replace(old, new)
    assert json.loads(json.dumps(second)) == json.loads(text)


def test_imports_are_found_by_search():
    storage = Memory()
    imported(OPEN_WEBUI, storage)
    assert len(Conversations(storage).search("ana", "hello").found) == 1


def test_senseless_details_of_our_own_form_do_no_harm():
    node = {
        "id": "a", "role": "user", "text": "x\ud800", "documents": 5, "sources": [7, {}, {"number": []}],
        "parts": [1], "usage": [], "feedback": 9, "status": "robot", "params": {"a\ud800": "\0"},
    }  # fmt: skip
    document = {"id": "d", "name": "n", "text": "t", "pages": [["x"]], "tokens": "many"}
    entry = {"format": "bise-conversation-1", "messages": [node], "documents": [document], "leaf": {}}
    storage = Memory()
    _, (conversation,), messages = imported(entry, storage)
    (message,) = messages.branch("ana", conversation.id)
    assert (message.text, message.status, message.feedback) == ("x\ufffd", "complete", None)
    json.dumps(as_json(conversation, [message]), ensure_ascii=False).encode()
    assert Documents(storage).get(
        "ana", conversation.id, Documents(storage).listing("ana", conversation.id)[0].id
    )
