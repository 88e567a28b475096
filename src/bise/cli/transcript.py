"""A conversation: system prompt and turns, saved and loaded as JSON of the shape that `bise score` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bise.config import bise_home, state_directory, user_path
from bise.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(slots=True)
class Transcript:
    """The turns so far; the only writer is the chat loop."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    own_files: set[Path] = field(default_factory=set[Path])
    """Files this session saved or loaded, which it may overwrite."""

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages for the template, the system prompt first."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def add(self, role: str, content: str) -> None:
        """Append a turn."""
        self.turns.append({"role": role, "content": content})

    def drop_last(self) -> None:
        """Take back the last turn (a question that could not be asked)."""
        self.turns.pop()

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def save(self, name: str) -> Path:
        """Write the conversation and return its path; refuse to overwrite a file of another session."""
        path = chat_path(name)
        if path.exists() and path not in self.own_files:
            raise UserError(f"{path} exists; /load it first or save under another name")
        partial = path.with_name(path.name + ".part")
        try:
            if path.parent == bise_home() / "chats":
                state_directory("chats")
            partial.write_text(
                json.dumps({"messages": self.messages()}, ensure_ascii=False, indent=1) + "\n",
                encoding="utf-8",
            )
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        self.own_files.add(path)
        return path

    def load(self, name: str) -> Path:
        """Replace the conversation by a saved one and return its path; UserError when it is not one."""
        path = chat_path(name)
        messages = read_messages(path)
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.system, self.turns = system, messages[1:] if system is not None else messages
        self.own_files.add(path)
        return path


def chat_path(name: str) -> Path:
    """Return where a conversation lies: a bare word under BISE_HOME/chats, anything else is a path."""
    if not name:
        raise UserError("give a name or a path")
    if name.isascii() and name.replace("-", "").replace("_", "").isalnum():
        return bise_home() / "chats" / f"{name}.json"
    return user_path(name).absolute()


def read_messages(path: Path) -> list[dict[str, Any]]:
    """Return the checked messages of a saved conversation."""
    from bise.jsonfile import read_json

    value = read_json(path)
    if not isinstance(value, dict) or "messages" not in value:
        raise UserError(f'{path}: not a saved conversation (an object with "messages" expected)')
    return check_messages(cast("dict[str, object]", value)["messages"], str(path))


def check_messages(value: object, where: str) -> list[dict[str, Any]]:
    """Return messages known to be well formed (role, text); UserError names place and message otherwise."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages must be a list with at least one message")
    messages: list[dict[str, Any]] = []
    for number, entry in enumerate(cast("list[object]", value), 1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: message {number} is not an object")
        message = cast("dict[str, Any]", entry)
        if message.get("role") not in ROLES:
            raise UserError(
                f"{where}: message {number} has role {message.get('role')!r}; known: {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {number} has no text in content")
        if extra := sorted(set(message) - {"role", "content"}):
            raise UserError(f"{where}: message {number} has {extra[0]!r}, which is not supported here")
        messages.append(message)
    return messages
