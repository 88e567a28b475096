"""Exports and imports: all branches survive, foreign forms are read, what is skipped is told."""

from __future__ import annotations

import json

import pytest

from bise.assistant.conversations import Conversations
from bise.assistant.exchange import as_json, as_markdown, read_export, store_imported
from bise.assistant.messages import Messages
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


def imported(document, storage=None):
    storage = storage or Memory()
    found, skipped = read_export(json.dumps(document).encode())
    report = store_imported(storage, "ana", found, skipped)
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


def test_a_bad_conversation_is_skipped_and_told():
    report, conversations, _ = imported([*CHATGPT, {"mapping": {"a": 7}}, {"other": 1}])
    assert len(conversations) == 1
    assert [line.split(":")[0] for line in report.skipped] == ["conversation 2", "conversation 3"]


@pytest.mark.parametrize("content", [b"no json", b"[]", b'{"a": 1}'])
def test_a_file_of_no_known_kind_is_refused(content):
    with pytest.raises(RequestError):
        read_export(content)


def test_imports_are_found_by_search():
    storage = Memory()
    imported(OPEN_WEBUI, storage)
    assert len(Conversations(storage).search("ana", "hello")) == 1
