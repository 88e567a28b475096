"""Mistral's own chat formats v1 to v15, token for token as mistral-common 1.13 spells them.

Owns how a conversation is put in order for each version (merged turns, where system prompts and tools go,
ids of tool calls) and which control tokens surround what. Text never becomes a control token: every piece
goes through `Tokenizer.encode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from bise.errors import ModelFileError, RequestError
from bise.text.messages import (
    FUNCTION_NAME,
    ChatMessage,
    Part,
    Thinking,
    ToolCall,
    ToolSpec,
    json_text,
    json_value,
    parse_messages,
    parse_tools,
    refuse,
)
from bise.text.mistral_tokenizer import CHAT_VERSIONS
from bise.text.template import Message, Tool
from bise.text.tokenizer import Tokenizer

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_FORMAT = re.compile(r"v(\d{1,2})(-tekken)?")
_JOIN = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """Consecutive messages of one role, merged."""

    role: str
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    prefix: bool = False
    place: str = "messages"


class MistralTemplate:
    """The chat format of one version over one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, chat_format: str, *, model_settings: str = "") -> None:
        """Choose the format: `v1`, `v3`, `v3-tekken`, `v7-tekken`, ...

        `model_settings`: JSON text that v15 shows the model. Raises ModelFileError for an unknown format,
        and when the vocabulary lacks a token that every conversation needs.
        """
        match = _FORMAT.fullmatch(chat_format)
        if not match or int(match[1]) not in CHAT_VERSIONS:
            known = ", ".join(f"v{version}" for version in CHAT_VERSIONS)
            raise ModelFileError(
                f"chat format '{chat_format}' is not known; known: {known}, with -tekken or without"
            )
        self.name = chat_format
        self._version = int(match[1])
        self._tokenizer = tokenizer
        self._model_settings = model_settings
        if tokenizer.bos_id is None:
            raise ModelFileError(f"chat format {chat_format} needs a BOS token; the vocabulary has none")
        self._bos = tokenizer.bos_id
        eos = tokenizer.control_id("</s>")
        if eos is None:
            raise ModelFileError(f"chat format {chat_format} needs </s>; the vocabulary has none")
        self._eos = eos
        for name in ("[INST]", "[/INST]") if self._version > 1 else ():
            if tokenizer.control_id(name) is None:
                raise ModelFileError(
                    f"chat format {chat_format} needs the control token {name}; the vocabulary has none"
                )

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        continue_final: bool = False,
    ) -> list[int]:
        """Return the prompt ids of a conversation, BOS included; see `ChatTemplate.encode`."""
        parsed = parse_messages(messages, continue_final=continue_final)
        specs = parse_tools(tools)
        if specs and self._version == 1:
            refuse("tools", "cannot be said in chat format v1; it knows no tools")
        _check_order(parsed)
        _check_pairs(parsed, by_id=self._version >= 11)
        for index, message in enumerate(parsed):
            self._check_message(message, f"messages[{index}]", is_last=index == len(parsed) - 1)
        system = None if self._version >= 7 else self._system_prompt(parsed)
        turns = list(self._merge(parsed))
        if not turns or (self._version < 7 and turns[0].role != "user"):
            turns.insert(0, _Turn(role="user"))
        if self._version == 2:
            _check_single_results(turns)
        ids = [self._bos]
        for piece in self._encode_turns(turns, specs, system):
            ids += piece
        return ids

    # What mistral-common's validator refuses.

    def _check_message(self, message: ChatMessage, place: str, *, is_last: bool) -> None:
        thoughts = isinstance(message.content, tuple) and any(
            isinstance(p, Thinking) for p in message.content
        )
        allowed = {"assistant": 13, "system": 13}.get(message.role, 99)
        if thoughts and (self._version < allowed or (self._version >= 15 and message.role == "system")):
            refuse(f"{place}.content", f"has a thinking part, which chat format {self.name} cannot say there")
        if message.role == "tool":
            if message.name is not None and not FUNCTION_NAME.fullmatch(message.name):
                refuse(f"{place}.name", "must be 1 to 64 letters, digits, _ or -")
            self._check_call_id(message.tool_call_id, f"{place}.tool_call_id")
        if message.role != "assistant":
            return
        if self._version < 7 and bool(message.content) == bool(message.tool_calls):
            refuse(place, f"must have either content or tool_calls in chat format {self.name}")
        if not message.content and not message.tool_calls:
            refuse(place, "must have content or tool_calls")
        for index, call in enumerate(message.tool_calls):
            if self._version == 1:
                refuse(f"{place}.tool_calls", "cannot be said in chat format v1; it knows no tools")
            self._check_call_id(call.id, f"{place}.tool_calls[{index}].id")
        if message.prefix and not is_last:
            refuse(f"{place}.prefix", "is true, but only the last message can be continued")

    def _check_call_id(self, call_id: str | None, place: str) -> None:
        if self._version >= 13:
            if not call_id or call_id == "null":
                refuse(place, f"is missing; chat format {self.name} pairs calls and results by it")
        elif self._version >= 3 and (call_id is None or not _CALL_ID.fullmatch(call_id)):
            refuse(place, f"must be 9 letters or digits in chat format {self.name}, got {call_id!r}"[:200])

    # Putting the conversation in order.

    def _system_prompt(self, messages: Sequence[ChatMessage]) -> str | None:
        texts = [self._text(m.content) for m in messages if m.role == "system" and m.content]
        return _JOIN.join(texts) if texts else None

    def _text(self, content: str | tuple[Part, ...] | None) -> str:
        joined = self._joined([content])
        assert isinstance(joined, str), "thinking was refused before"
        return joined

    def _joined(self, contents: Sequence[str | tuple[Part, ...] | None]) -> str | tuple[Part, ...]:
        """Merge texts: a blank line between messages and (before v15) between the text parts of one
        message.
        """
        merged: list[Part] = []
        for content in contents:
            join = _JOIN
            for part in (content,) if isinstance(content, str) else content or ():
                if isinstance(part, Thinking):
                    merged.append(part)
                elif part and merged and isinstance(merged[-1], str):
                    merged[-1] += join + part
                elif part:
                    merged.append(part)
                if part:
                    join = _JOIN if self._version < 15 else ""
        if any(isinstance(part, Thinking) for part in merged):
            return tuple(merged)
        return "".join(part for part in merged if isinstance(part, str))

    def _merge(self, messages: Sequence[ChatMessage]) -> Iterator[_Turn]:
        latest_calls: list[str | None] = []
        numbered = [(f"messages[{index}]", message) for index, message in enumerate(messages)]
        for role, group in groupby(numbered, key=lambda item: item[1].role):
            places, members = zip(*group, strict=True)
            if role == "tool":
                yield from self._tool_turns(members, places, latest_calls)
                latest_calls.clear()
            elif role == "system":
                if self._version >= 7:
                    for place, message in zip(places, members, strict=True):
                        yield _Turn(role=role, content=self._joined([message.content]), place=place)
            else:
                calls = tuple(call for message in members for call in message.tool_calls)
                latest_calls += [call.id for call in calls]
                yield _Turn(
                    role=role,
                    content=self._joined([message.content for message in members]),
                    tool_calls=calls,
                    prefix=any(message.prefix for message in members),
                    place=places[-1],
                )

    def _tool_turns(
        self, messages: Sequence[ChatMessage], places: Sequence[str], latest_calls: Sequence[str | None]
    ) -> list[_Turn]:
        turns: list[_Turn] = []
        for place, message in zip(places, messages, strict=True):
            text = self._text(message.content)
            if self._version < 7:
                text = json_text(json_value(text, place), place) if _is_json(text, place) else text or "{}"
            turns.append(
                _Turn(
                    role="tool",
                    content=text,
                    tool_call_id=message.tool_call_id,
                    name=message.name,
                    place=place,
                )
            )
        if self._version >= 11:
            order = {call_id: index for index, call_id in enumerate(latest_calls)}
            # Ids that no call has come last; equal ids keep the place of the last one, as in mistral-common.
            places_by_id = {turn.tool_call_id: index for index, turn in enumerate(turns)}
            turns.sort(
                key=lambda turn: (order.get(turn.tool_call_id, len(order)), places_by_id[turn.tool_call_id])
            )
        return turns

    # Spelling it.

    def _encode_turns(
        self, turns: Sequence[_Turn], tools: Sequence[ToolSpec], system: str | None
    ) -> Iterator[list[int]]:
        users = [index for index, turn in enumerate(turns) if turn.role == "user"]
        first, last = (users[0], users[-1]) if users else (-1, -1)
        if tools and not users:
            refuse("tools", f"need a user message in chat format {self.name}")
        for index, turn in enumerate(turns):
            if turn.role == "user":
                says_system = index == (first if self._version == 1 else last)
                has_tools = index == (first if self._version >= 13 else last)
                text = f"{system}{_JOIN}{turn.content}" if system and says_system else turn.content
                yield from self._encode_user(str(text), tools if has_tools else (), settings=has_tools)
            elif turn.role == "system":
                yield [self._control("[SYSTEM_PROMPT]")]
                yield from self._encode_parts(turn.content)
                yield [self._control("[/SYSTEM_PROMPT]")]
            elif turn.role == "tool":
                if self._version == 1:
                    refuse(turn.place, "cannot be said in chat format v1; it knows no tools")
                if self._version > 2 or index > last:
                    yield from self._encode_result(turn)
            elif self._version != 2 or index > last or not turn.tool_calls:
                yield from self._encode_assistant(turn)

    def _encode_user(self, text: str, tools: Sequence[ToolSpec], *, settings: bool) -> Iterator[list[int]]:
        if self._version == 1:
            yield self._tokenizer.encode(f"[INST] {text} [/INST]")
            return
        if tools:
            spelled = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": dict(tool.parameters),
                    },
                }
                for tool in tools
            ]
            yield [self._control("[AVAILABLE_TOOLS]")]
            yield self._tokenizer.encode(json_text(spelled, "tools"))
            yield [self._control("[/AVAILABLE_TOOLS]")]
        if settings and self._model_settings:
            yield [self._control("[MODEL_SETTINGS]")]
            yield self._tokenizer.encode(self._model_settings)
            yield [self._control("[/MODEL_SETTINGS]")]
        yield [self._control("[INST]")]
        yield self._tokenizer.encode(text)
        yield [self._control("[/INST]")]

    def _encode_parts(self, content: str | tuple[Part, ...]) -> Iterator[list[int]]:
        for part in (content,) if isinstance(content, str) else content:
            if isinstance(part, Thinking):
                yield [self._control("[THINK]")]
                yield self._tokenizer.encode(part.text)
                if part.closed:
                    yield [self._control("[/THINK]")]
            else:
                yield self._tokenizer.encode(part)

    def _encode_assistant(self, turn: _Turn) -> Iterator[list[int]]:
        if not turn.content and not turn.tool_calls:
            refuse(
                f"{turn.place}.content", "is empty; an assistant's message must say something or call a tool"
            )
        if isinstance(turn.content, str) and turn.content:
            yield self._tokenizer.encode(turn.content if self._version == 1 else turn.content.rstrip(" "))
        else:
            yield from self._encode_parts(turn.content)
        if turn.tool_calls:
            yield from self._encode_calls(turn)
        if not turn.prefix:
            yield [self._eos]

    def _encode_calls(self, turn: _Turn) -> Iterator[list[int]]:
        place = f"{turn.place}.tool_calls"
        if self._version >= 11:
            for call in turn.tool_calls:
                yield [self._control("[TOOL_CALLS]")]
                yield self._tokenizer.encode(call.name)
                if self._version == 11:
                    yield [self._control("[CALL_ID]")]
                    yield self._tokenizer.encode(call.id or "")
                yield [self._control("[ARGS]")]
                yield self._tokenizer.encode(json_text(json_value(call.arguments, place), place))
            return
        spelled: list[dict[str, object]] = []
        for call in turn.tool_calls:
            entry: dict[str, object] = {"name": call.name, "arguments": json_value(call.arguments, place)}
            spelled.append(entry if self._version == 2 else entry | {"id": call.id})
        yield [self._control("[TOOL_CALLS]")]
        yield self._tokenizer.encode(json_text(spelled, place))

    def _encode_result(self, turn: _Turn) -> Iterator[list[int]]:
        text = str(turn.content)
        yield [self._control("[TOOL_RESULTS]")]
        if self._version == 2:
            spelled = [{"name": turn.name, "content": json_value(text, turn.place)}]
            yield self._tokenizer.encode(json_text(spelled, turn.place))
        elif self._version == 3:
            answer = {"content": json_value(text, turn.place), "call_id": turn.tool_call_id}
            yield self._tokenizer.encode(json_text(answer, turn.place))
        else:
            if self._version < 13:
                yield self._tokenizer.encode(turn.tool_call_id or "")
                yield [self._control("[TOOL_CONTENT]")]
            yield self._tokenizer.encode(text)
        yield [self._control("[/TOOL_RESULTS]")]

    def _control(self, name: str) -> int:
        token_id = self._tokenizer.control_id(name)
        if token_id is None:
            raise RequestError(
                f"the model's vocabulary has no {name}, which this conversation needs", field=name
            )
        return token_id


def _is_json(text: str, place: str) -> bool:
    return bool(text) and json_value(text, place) is not text


def _check_order(messages: Sequence[ChatMessage]) -> None:
    """Refuse sequences of roles that Mistral's models never saw."""
    if len(messages) == 1 and messages[0].role not in ("user", "system"):
        refuse("messages[0].role", f"is {messages[0].role}; a conversation starts with user or system")
    last = messages[-1]
    if last.role == "assistant" and not last.prefix:
        refuse(
            f"messages[{len(messages) - 1}].role",
            "is assistant; the last message must be a user's or a tool's, or be continued",
        )
    follows = {
        "system": ("user", "assistant", "system"),
        "user": ("assistant", "system", "user"),
        "assistant": ("assistant", "user", "tool"),
        "tool": ("assistant", "tool", "user"),
    }
    for index in range(1, len(messages)):
        before, role = messages[index - 1].role, messages[index].role
        if role not in follows[before]:
            refuse(f"messages[{index}].role", f"is {role}, which cannot follow {before}")


def _check_pairs(messages: Sequence[ChatMessage], *, by_id: bool) -> None:
    """Refuse tool results without calls, and calls that the next assistant message leaves unanswered.

    The first message is not looked at, as in mistral-common; what is open at the end may still be answered.
    """
    expected: list[str | None] = []
    answered: list[str | None] = []
    for index, message in enumerate(messages[1:], start=1):
        place = f"messages[{index}]"
        if message.role == "tool":
            if by_id and message.tool_call_id in answered:
                refuse(f"{place}.tool_call_id", f"answers the call {message.tool_call_id!r} a second time")
            if by_id and message.tool_call_id not in expected:
                refuse(f"{place}.tool_call_id", f"{message.tool_call_id!r} is no id of the calls before it")
            answered.append(message.tool_call_id)
        elif message.role == "assistant":
            if len(expected) != len(answered):
                refuse(
                    place,
                    f"follows {len(expected)} tool calls and {len(answered)} tool results; each needs one",
                )
            ids = [call.id for call in message.tool_calls]
            if by_id and len(set(ids)) != len(ids):
                refuse(f"{place}.tool_calls", "use one id twice")
            expected, answered = ids, []


def _check_single_results(turns: Sequence[_Turn]) -> None:
    """Refuse several results for one assistant turn after the last user message, which v2 cannot spell."""
    last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=0)
    results, has_calls = 0, False
    for turn in turns[last_user:]:
        if turn.role == "tool":
            results += has_calls
            if results > 1:
                refuse(turn.place, "is a second tool result for one turn, which chat format v2 cannot say")
        else:
            has_calls, results = turn.role == "assistant" and bool(turn.tool_calls), 0
