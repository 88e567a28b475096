"""Exports in the form that other programs write, field for field, with words of our own in them.

Where the forms were learned: ChatGPT's and open-webui's from the importers and test data of LibreChat
(api/server/utils/import, August 2026), LibreChat's own from the same place, version 1 with `messagesTree` and
version 2 with `messages`; llama.cpp's sessions (JSONL, and ZIP of them) and its older JSON from
tools/ui/src/lib/services/conversation-transfer.service.ts and types/database.d.ts (2026).
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest

from bise.assistant.conversations import Conversations
from bise.assistant.documents import Documents
from bise.assistant.exchange import import_file
from bise.assistant.messages import Messages
from bise.assistant.storage import Memory

EXPORTS = Path(__file__).with_name("exports")


class Taken:
    """What an import of one file leaves behind."""

    def __init__(self, content: bytes):
        self.storage = Memory()
        self.report = import_file(self.storage, "ana", io.BytesIO(content))
        self.conversations = Conversations(self.storage).listing("ana")
        self.first = self.conversations[0]

    def branch(self):
        return Messages(self.storage).branch("ana", self.first.id)

    def said(self):
        return [(message.role, message.text) for message in self.branch()]

    def all(self):
        return {message.text: message for message in Messages(self.storage).all("ana", self.first.id)}


def taken(name):
    return Taken((EXPORTS / name).read_bytes())


def parts(message):
    return [(part["type"], part.get("text") or part.get("arguments")) for part in message.parts]


def test_chatgpt():
    found = taken("chatgpt.json")
    assert found.said() == [
        ("user", "Which cloud is this?"),
        ("assistant", "Cirrus. ([atlas](https://clouds.example/cirrus)) It is made of ice."),
        ("user", "And tomorrow?"),
        ("assistant", "Fair."),
    ]
    first, answer, _, last = found.branch()
    assert parts(answer) == [
        ("thinking", "Looking\nIt is high and thin."),
        ("tool_call", 'search("cirrus")'),
        ("tool_result", "Cirrus: a high cloud."),
    ]
    assert (answer.parts[0]["seconds"], answer.parts[1]["name"], answer.model) == (
        8.0,
        "web",
        "gpt-5-thinking",
    )
    assert parts(last) == [("tool_call", "print(1)"), ("tool_result", "1")]
    assert last.model == "gpt-5"  # the conversation's: newer exports leave a message's metadata out
    assert len(answer.siblings) == 2
    assert (found.first.system, found.first.updated_at) == ("I sail.\n\nBe brief.", 1756000400.654)
    assert first.created_at == 1756000001.5
    report = found.report
    assert (report.conversations, report.messages, report.num_skipped) == (1, 5, 1)
    assert "Half a record" in report.skipped[0]
    assert report.left_out == {"pictures": 2, "recordings": 1, "hidden messages": 1}


def test_open_webui():
    found = taken("open_webui.json")
    assert found.said() == [
        ("user", "How warm is it in Sion?"), ("assistant", "25 degrees."), ("user", "And this?"),
        ("assistant", ""),
    ]  # fmt: skip
    by_text = found.all()
    tool = [("tool_call", '{"city": "Sion"}'), ("tool_result", '"24 C"')]
    assert parts(by_text["24 degrees."]) == [("thinking", "I need\na tool."), *tool]
    assert by_text["24 degrees."].parts[0]["seconds"] == 3.0
    assert by_text["24 degrees."].feedback == 1
    assert parts(by_text["25 degrees."]) == [
        ("thinking", "I ask again."), ("tool_call", '{"city":"Sion"}'), ("tool_result", "25 C"),
    ]  # fmt: skip
    assert by_text["25 degrees."].parts[2]["name"] == "weather"
    assert (found.first.pinned, found.first.system) == (True, "Be kind.")
    assert (by_text[""].status, by_text[""].error) == ("error", "The model is gone.")
    assert found.report.left_out == {"files": 1, "sources": 1, "pictures": 1}


def test_one_chat_of_open_webui_is_the_same_alone_and_without_its_frame():
    (whole,) = json.loads((EXPORTS / "open_webui.json").read_bytes())
    for form in (whole, {"chat": whole["chat"]}, [{"chat": whole["chat"]}]):
        assert Taken(json.dumps(form).encode()).said() == taken("open_webui.json").said()


def test_librechat_with_a_tree():
    found = taken("librechat_1.json")
    assert found.report.messages == 5
    by_text = found.all()
    assert {message.text: message.role for message in by_text.values()} == {
        "Which knot holds?": "user", "A bowline.": "assistant", "A cleat hitch.": "assistant",
        "Show me.": "user", "Make a": "assistant",
    }  # fmt: skip
    assert by_text["Make a"].status == "interrupted"
    assert by_text["A cleat hitch."].feedback == -1
    assert by_text["A bowline."].parent_id == by_text["A cleat hitch."].parent_id
    assert by_text["A bowline."].model == "gpt-4-turbo"
    assert found.first.system == "You are a sailor."
    assert found.first.created_at == pytest.approx(1714581311.53)
    assert found.report.left_out == {"pictures": 1}


def test_librechat_with_a_list():
    found = taken("librechat_2.json")
    by_text = found.all()
    assert parts(by_text["A bowline."]) == [
        ("thinking", "Rope under load."), ("tool_call", '{"q":"knot"}'), ("tool_result", "bowline, p. 4"),
    ]  # fmt: skip
    assert by_text["A bowline."].finish_reason == "length"
    assert (by_text["No connection"].status, by_text["No connection"].error) == ("error", "No connection")
    assert found.report.left_out == {"parts of unknown kind": 1}


@pytest.mark.parametrize("name", ["llama.jsonl", "llama.json"])
def test_llama_cpp(name):
    found = taken(name)
    ropes = next(entry for entry in found.conversations if entry.title == "Ropes")
    branch = Messages(found.storage).branch("ana", ropes.id)
    assert [(message.role, message.text) for message in branch] == [
        ("user", "Which rope floats?"), ("assistant", "Polypropylene."),
    ]  # fmt: skip
    question, answer = branch
    assert parts(answer) == [
        ("thinking", "I look it up."), ("tool_call", '{"q":"rope"}'), ("tool_result", "polypropylene"),
    ]  # fmt: skip
    assert [part.get("name") for part in answer.parts[1:]] == ["lookup", "lookup"]
    assert len(answer.siblings) == 2
    document = Documents(found.storage).get("ana", ropes.id, question.documents[0])
    assert (document.name, document.text) == ("ropes.txt", "Polypropylene floats.")
    assert (ropes.system, ropes.updated_at) == ("Be brief.", 1760000100.0)
    assert found.report.left_out == {"pictures": 1}
    assert found.report.conversations == (2 if name == "llama.jsonl" else 1)


def test_an_archive_of_llama_cpps_sessions_and_one_of_chatgpts_parts():
    session, chats = (EXPORTS / "llama.jsonl").read_bytes(), (EXPORTS / "chatgpt.json").read_bytes()
    for names, content, count in (
        (("2026-01-01_conv_c1_ropes.jsonl", "2026-01-01_conv_c1_ropes_1.jsonl"), session, 4),
        (("conversations-000.json", "export/conversations-001.json", "user.json"), chats, 2),
    ):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, b"{}" if name == "user.json" else content)
        assert Taken(out.getvalue()).report.conversations == count


def test_the_report_says_over_http_what_had_no_place(run):
    async def scenario(site):
        kind = {"content-type": "application/octet-stream"}
        content = (EXPORTS / "chatgpt.json").read_bytes()
        report = await site.post("/api/v1/import", content=content, headers=kind)
        assert report.status_code == 201
        assert report.json()["left_out"] == {"pictures": 2, "recordings": 1, "hidden messages": 1}
        assert (report.json()["messages"], report.json()["num_skipped"]) == (5, 1)
        refused = await site.post("/api/v1/import", content=b"{}", headers=kind)
        assert (refused.status_code, "nothing was imported" in refused.text) == (400, True)

    run(scenario)
