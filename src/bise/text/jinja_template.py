"""Chat formats that a model carries as a Jinja template, rendered as Hugging Face's transformers does.

Owns what the template sees and how its text becomes ids: control tokens come from the template's own
words only. A text of the user that holds a control string (or the beginning of one at its end) is
rendered with stand-ins for the characters with which control strings start, which are turned back before
the text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import cast
from urllib.parse import quote

from bise.errors import RequestError
from bise.text.jinja_process import JinjaProcess
from bise.text.messages import json_value, parse_messages, parse_tools, refuse
from bise.text.template import Message, Tool
from bise.text.tokenizer import Tokenizer

_STAND_INS = range(0xF0000, 0xFFFFD)
"""A private plane: no script, no case, no white space, so that filters leave it alone."""


class JinjaTemplate:
    """The chat format of a Jinja template over one vocabulary."""

    name = "jinja"

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        file: str,
        *,
        special_tokens: Mapping[str, str],
        tool_source: str | None = None,
        adds_bos: bool = False,
    ) -> None:
        """Take the template of `file` (for messages).

        `special_tokens`: bos_token, eos_token and the like, as the template sees them. `tool_source`: the
        template for requests with tools, when there is one of its own. `adds_bos`: put BOS first when the
        template does not (GGUF's rule; Hugging Face leaves it to the template).
        """
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._process = JinjaProcess(source, file)
        self._tool_process = JinjaProcess(tool_source, f"{file} (tool_use)") if tool_source else self._process
        self._adds_bos = adds_bos
        self._openings = {text[:length] for text in tokenizer.controls for length in range(1, len(text))}
        self._longest = max(map(len, tokenizer.controls), default=0)

    def check(self) -> None:
        """Compile the template; ModelFileError when it is malformed."""
        self._process.check()

    def close(self) -> None:
        """End the processes; the next use starts fresh ones."""
        self._process.close()
        self._tool_process.close()

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        continue_final: bool = False,
    ) -> list[int]:
        """Return the prompt ids of a conversation; see `ChatTemplate.encode`."""
        parsed = parse_messages(messages, continue_final=continue_final)
        parse_tools(tools)
        last = parsed[-1]
        if last.role == "assistant" and not last.prefix:
            refuse(
                f"messages[{len(parsed) - 1}].role",
                "is assistant; the last message is a user's, or is continued",
            )

        def variables(change: Callable[[str], str]) -> dict[str, object]:
            return {
                "messages": [_message(m, f"messages[{n}]", change) for n, m in enumerate(messages)],
                "tools": [_tool(tool, change) for tool in tools] if tools else None,
            }

        texts: list[str] = []
        plain = variables(lambda text: texts.append(text) or text)
        guard = _Guard(self._tokenizer, texts, self._is_dangerous)
        process = self._tool_process if tools else self._process
        text = process.render(
            (variables(guard.replace) if guard.is_needed else plain)
            | self._special_tokens
            | {"documents": None, "add_generation_prompt": not last.prefix}
        )
        if last.prefix:
            text = _cut_after(text, guard.replace(_flat_text(last.content or "")))
        return self._ids(guard, text)

    def _is_dangerous(self, text: str) -> bool:
        """Say whether a user's text holds a control string, or ends as one begins."""
        return any(isinstance(part, int) for part in self._tokenizer.split_controls(text)) or any(
            text[-length:] in self._openings for length in range(1, min(self._longest, len(text) + 1))
        )

    def _ids(self, guard: _Guard, text: str) -> list[int]:
        guard.check(text)
        ids: list[int] = []
        for part in self._tokenizer.split_controls(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode(guard.restore(part), start=not ids)
        if not ids:
            raise RequestError(
                "the model's chat template makes nothing of this conversation", field="messages"
            )
        bos = self._tokenizer.bos_id
        return [bos, *ids] if self._adds_bos and bos is not None and ids[0] != bos else ids


def _message(message: Message, place: str, change: Callable[[str], str]) -> dict[str, object]:
    """Return a checked message as templates expect it: one text, arguments as objects; `change` on the
    user's texts.
    """
    result = {key: value for key, value in message.items() if key != "prefix"}
    if isinstance(content := result.get("content"), list | tuple):
        parts = [cast(Mapping[str, object], part) for part in cast(list[object], content)]
        if any(part["type"] != "text" for part in parts):
            refuse(f"{place}.content", "has a thinking part, which this model's chat template does not know")
        result["content"] = _flat_text([str(part["text"]) for part in parts])
    for key in ("content", "name", "tool_call_id", "reasoning", "reasoning_content"):
        if isinstance(value := result.get(key), str):
            result[key] = change(value)
    if calls := cast(list[Mapping[str, object]] | None, result.get("tool_calls")):
        result["tool_calls"] = [_tool_call(call, f"{place}.tool_calls", change) for call in calls]
    return result


def _tool_call(call: Mapping[str, object], place: str, change: Callable[[str], str]) -> dict[str, object]:
    function = cast(Mapping[str, object], call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json_value(arguments, place)
    changed = dict(call) | {"function": dict(function) | {"arguments": _deeply(arguments, change)}}
    return changed | {"id": change(call_id)} if isinstance(call_id := call.get("id"), str) else changed


def _tool(tool: Tool, change: Callable[[str], str]) -> dict[str, object]:
    function = cast(Mapping[str, object], tool["function"])
    texts = {key: _deeply(function[key], change) for key in ("description", "parameters") if key in function}
    return dict(tool) | {"function": dict(function) | texts}


def _flat_text(content: str | Sequence[object]) -> str:
    return (
        content if isinstance(content, str) else "\n".join(part for part in content if isinstance(part, str))
    )


def _cut_after(text: str, final: str) -> str:
    """Return `text` up to the end of the message that is continued, white space as the template left it."""
    place = text.rfind(final.strip())
    if not final.strip() or place < 0:
        raise RequestError(
            "the chat template changes the message that is to be continued", field="continue_final"
        )
    tail = final.lstrip() if text.startswith(final.lstrip(), place) else final.strip()
    return text[: place + len(tail)]


class _Guard:
    """Keeps control strings in the user's texts from being seen as such in the rendered text."""

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], is_dangerous: Callable[[str], bool]
    ) -> None:
        self._dangerous = {text for text in texts if is_dangerous(text)}
        used = {char for text in self._dangerous for char in text if char >= chr(_STAND_INS.start)}
        free = (chr(code) for code in _STAND_INS if chr(code) not in used)
        openings = sorted({text[0] for text in tokenizer.controls}) if self._dangerous else []
        self._to = {ord(char): next(free) for char in openings}
        self._back = {ord(stand_in): chr(code) for code, stand_in in self._to.items()}

    @property
    def is_needed(self) -> bool:
        """True when some text is dangerous."""
        return bool(self._dangerous)

    def replace(self, text: str) -> str:
        """Return a dangerous text with stand-ins, any other as it is."""
        return text.translate(self._to) if text in self._dangerous else text

    def restore(self, text: str) -> str:
        """Return `text` with every stand-in turned back."""
        return text.translate(self._back) if self._back else text

    def check(self, text: str) -> None:
        """Refuse a rendered text in which a stand-in was spelled differently, so that it cannot be turned
        back.
        """
        for stand_in in self._to.values():
            if json.dumps(stand_in)[1:-1] in text or quote(stand_in) in text:
                raise RequestError(
                    "a message holds a control string of this model, and the chat template respells "
                    "messages; remove the string",
                    field="messages",
                )


def _deeply(value: object, change: Callable[[str], str]) -> object:
    """Return a copy of a JSON value with every string and key changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_deeply(item, change) for item in cast(list[object], value)]
    if isinstance(value, Mapping):
        return {change(key): _deeply(item, change) for key, item in cast(Mapping[str, object], value).items()}
    return value
