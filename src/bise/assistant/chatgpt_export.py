"""A conversation of ChatGPT's `conversations.json`: a tree of nodes, many of them no messages for people."""

from __future__ import annotations

import re
from typing import Any, cast

from bise.assistant.imported import (
    BadError,
    Imported,
    Json,
    Turn,
    call_part,
    list_of,
    object_of,
    result_part,
    text_of,
    text_or_none,
    thought_part,
    time_of,
)

_CITATION = re.compile("\ue200[^\ue200\ue201]*\ue201")
"""A mark in an answer that stands for a source."""
_RECORDING = (
    "audio_asset_pointer",
    "real_time_user_audio_video_asset_pointer",
    "video_container_asset_pointer",
)


def from_chatgpt(entry: Json) -> Imported:
    """Return a conversation with all its branches. Raises BadError."""
    found = Imported(
        text_of(entry.get("title")),
        leaf=text_or_none(entry.get("current_node")),
        at=time_of(entry.get("create_time")),
    )
    usual = text_or_none(entry.get("default_model_slug"))
    instructions: list[str] = []
    by_key: dict[str, Turn] = {}
    for key, node in cast("dict[str, Any]", entry["mapping"]).items():
        if not isinstance(node, dict):
            raise BadError(f"mapping.{key[:40]} is no object")
        shown = cast("dict[str, Any]", node)
        turn = by_key[key] = Turn(key, text_or_none(shown.get("parent")))
        found.turns.append(turn)
        message = object_of(shown.get("message"))
        if message:
            instructions += _read(found, turn, message, by_key)
            if turn.role == "assistant":
                turn.model = text_or_none(object_of(message.get("metadata")).get("model_slug")) or usual
    found.system = "\n\n".join(part for part in instructions if part.strip())
    found.extra = {
        "archived": entry.get("is_archived") is True,
        "pinned": entry.get("is_starred") is True,
        "updated_at": time_of(entry.get("update_time")),
    }
    return found


def _read(found: Imported, turn: Turn, message: Json, before: dict[str, Turn]) -> list[str]:
    """Fill a turn from its node; return the person's standing instructions, which one kind of node holds."""
    details, content = object_of(message.get("metadata")), object_of(message.get("content"))
    role = text_of(object_of(message.get("author")).get("role"))
    kind = text_of(content.get("content_type")) or "text"
    recipient = message.get("recipient")
    turn.at = time_of(message.get("create_time"))
    if kind == "user_editable_context":
        return [text_of(content.get(name)) for name in ("user_profile", "user_instructions")]
    text = _words(found, turn, content)
    if details.get("is_visually_hidden_from_conversation") is True or role not in (
        "user",
        "assistant",
        "tool",
    ):
        found.leave_out("hidden messages", 1 if text.strip() else 0)
    elif role == "tool":
        turn.parts = [result_part(object_of(message.get("author")).get("name"), text)] if text else []
    elif role == "user":
        turn.role, turn.text = "user", text
        found.leave_out("files", len(list_of(details, "attachments")) - _pictures(content), turn)
    elif kind == "thoughts" or message.get("channel") == "analysis":
        turn.parts = [thought_part(text)] if text else []
    elif kind == "reasoning_recap":
        _time_thought(turn, details, before)
    elif kind == "code" or recipient not in (None, "all"):
        turn.parts = [call_part(recipient if recipient not in (None, "all") else "code", text)]
    elif kind in ("text", "multimodal_text"):
        turn.role, turn.text = "assistant", _without_marks(text, details)
    else:
        found.leave_out("messages of unknown kind", 1)
    return []


def _words(found: Imported, turn: Turn, content: Json) -> str:
    """Return the words of a message: its parts' texts, transcripts included; count pictures and sound."""
    words = [text_of(content.get(name)) for name in ("text", "result")]
    for part in [*list_of(content, "parts"), *list_of(content, "thoughts")]:
        inner = object_of(part)
        kind = text_of(inner.get("content_type"))
        if kind == "image_asset_pointer":
            found.leave_out("pictures", 1, turn)
        elif kind in _RECORDING:
            found.leave_out("recordings", 1, turn)
        words += [text_of(part), *(text_of(inner.get(name)) for name in ("summary", "text", "content"))]
    if "screenshot" in content:
        found.leave_out("pictures", 1, turn)
    return "\n".join(text for text in words if text)


def _pictures(content: Json) -> int:
    """Return how many pictures a question holds: they are among its attachments, too."""
    kinds = [object_of(part).get("content_type") for part in list_of(content, "parts")]
    return kinds.count("image_asset_pointer")


def _time_thought(turn: Turn, details: Json, before: dict[str, Turn]) -> None:
    """Note how long was thought with the thought itself, which is the nearest node above that has parts."""
    above = before.get(turn.parent or "")
    for _ in range(len(before)):
        if above is None or above.role:
            return
        if thoughts := [part for part in above.parts if part["type"] == "thinking"]:
            seconds = details.get("finished_duration_sec")
            thoughts[-1].update(thought_part(thoughts[-1]["text"], seconds))
            return
        above = before.get(above.parent or "")


def _without_marks(text: str, details: Json) -> str:
    """Return an answer with its sources as links where the export says which they are."""
    for reference in map(object_of, list_of(details, "content_references")):
        mark, alt = text_of(reference.get("matched_text")), text_of(reference.get("alt"))
        if mark.startswith(("\ue200", "【")):
            text = text.replace(mark, alt, 1)
    return _CITATION.sub("", text)
