"""Training data: JSONL to token rows that know which tokens are learned; every bad line is found first.

Owns what a line may look like and the report on a file. Knows nothing of torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bise.config import user_path
from bise.diskfile import read_bounded
from bise.errors import BiseError, RequestError, UserError
from bise.jsonfile import kind_of, parse_json
from bise.text.messages import parse_messages, parse_tools, refuse
from bise.text.template import ChatTemplate, Message, Tool
from bise.text.tokenizer import Tokenizer
from bise.text.turns import LearnedText, assistant_texts

MAX_DATA_BYTES = 4 << 30
"""Largest data file; it is held in memory."""
MAX_LINE_BYTES = 16 << 20
SHOWN_ERRORS = 3
"""Bad lines named in an error; `bise tune check` lists all."""

_FORMS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "chat": (frozenset({"messages"}), frozenset({"tools", "parallel_tool_calls"})),
    "text": (frozenset({"text"}), frozenset()),
    "preference": (frozenset({"chosen", "rejected"}), frozenset({"prompt", "tools"})),
    "preference of OpenAI's API": (
        frozenset({"input", "preferred_output", "non_preferred_output"}), frozenset(),
    ),
}  # fmt: skip
"""The keys that a line of each kind must have, and those that it may have."""
_DOCUMENT_ERRORS = 3
"""From so many bad lines on, and no good one, the file as a whole is looked at."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """One fault of a data file."""

    line: int
    """From 1; 0 for a fault of the whole file."""
    field: str
    """Such as messages[1].role; "" for the line itself."""
    reason: str

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return where + (self.reason if self.reason.startswith(self.field) else f"{self.field} {self.reason}")


@dataclass(frozen=True, slots=True)
class Example:
    """What is learned from one line."""

    line: int
    kind: str
    """chat, text or preference."""
    texts: tuple[LearnedText, ...]
    """The texts to learn; of a preference the chosen one, then the rejected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A data file, read and checked in whole."""

    path: Path
    sha256: str
    examples: tuple[Example, ...]
    bad: tuple[BadLine, ...]
    duplicates: tuple[tuple[int, int], ...]
    """(line, earlier line) of lines with the same tokens."""

    @property
    def kinds(self) -> dict[str, int]:
        """Lines of each kind."""
        return dict(Counter(example.kind for example in self.examples))

    @property
    def texts(self) -> list[LearnedText]:
        """Every text, in the order of the file."""
        return [text for example in self.examples for text in example.texts]

    def require_good(self) -> None:
        """Raise UserError naming the first bad lines, if there are any."""
        if self.bad:
            more = f"; and {len(self.bad) - SHOWN_ERRORS} more" if len(self.bad) > SHOWN_ERRORS else ""
            shown = "; ".join(str(bad) for bad in self.bad[:SHOWN_ERRORS])
            raise UserError(
                f"{self.path}: {shown}{more} (`bise tune check {self.path}` lists all)",
                field=self.bad[0].field or str(self.path),
            )


def read_data(
    path: Path,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    progress: Callable[[str, float], None] | None = None,
) -> DataFile:
    """Read a JSONL file of chats, texts or preference pairs and turn each line into tokens.

    Bad lines do not raise; they are in `DataFile.bad`. Raises UserError when the file itself cannot be read.
    """
    content = read_bounded(user_path(path), MAX_DATA_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    content = content.removeprefix(b"\xef\xbb\xbf")  # a mark that some editors put in front of UTF-8
    examples: list[Example] = []
    bad: list[BadLine] = []
    first_lines: dict[object, int] = {}
    duplicates: list[tuple[int, int]] = []
    lines = content.split(b"\n")
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            example = Example(number, *_read_line(raw, number, tokenizer, template))
        except BiseError as error:
            reason = str(error).removeprefix(f"line {number}: ").removeprefix(f"line {number} ")
            bad.append(BadLine(number, (error.field or "") if _is_place(error) else "", reason))
            continue
        earlier = first_lines.setdefault(example.texts, number)
        if earlier != number:
            duplicates.append((number, earlier))
        examples.append(example)
        if progress is not None:
            progress("reading the data", number / len(lines))
    if not examples and not bad:
        bad.append(BadLine(0, "", "the file has no examples"))
    if not examples and len(bad) >= _DOCUMENT_ERRORS and _is_document(content):
        bad = [
            BadLine(0, "", "the file is one JSON document over several lines; JSONL has one object a line")
        ]
    if len({example.kind == "preference" for example in examples}) > 1:
        odd = next(e for e in examples if (e.kind == "preference") != (examples[0].kind == "preference"))
        bad.append(
            BadLine(odd.line, "", f"is of kind {odd.kind}, line {examples[0].line} is {examples[0].kind}; "
                    "preference pairs and other lines need files of their own")
        )  # fmt: skip
    return DataFile(
        path=path,
        sha256=digest,
        examples=tuple(examples),
        bad=tuple(bad),
        duplicates=tuple(duplicates),
    )


def _is_document(content: bytes) -> bool:
    """Say whether a file of bad lines is good JSON as a whole."""
    try:
        parse_json(content, "the file")
    except BiseError:
        return False
    return True


def _is_place(error: BiseError) -> bool:
    """Say whether the error names a place inside of the line."""
    return isinstance(error, RequestError) and error.field is not None


def _read_line(
    raw: bytes, number: int, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[str, tuple[LearnedText, ...]]:
    if len(raw) > MAX_LINE_BYTES:
        raise UserError(f"is {len(raw)} bytes long; at most {MAX_LINE_BYTES} are read")
    value = parse_json(raw, f"line {number}")
    if not isinstance(value, dict):
        raise UserError(f"is {kind_of(value)}, not a JSON object")
    row = cast(dict[str, object], value)
    kind = _kind(row)
    if kind == "text":
        return kind, (_plain_text(row["text"], tokenizer),)
    if template is None:
        refuse("messages", "cannot be learned: this model has no chat template; use plain `text` lines")
    if kind == "chat":
        return kind, tuple(_chat(row, "messages", row["messages"], tokenizer, template))
    return kind, _preference(row, tokenizer, template)


def _kind(row: Mapping[str, object]) -> str:
    for kind, (needed, allowed) in _FORMS.items():
        if needed <= row.keys() <= needed | allowed:
            return kind.partition(" ")[0]
    raise UserError(
        f"has the keys {', '.join(sorted(row)) or 'none'}; known: messages (and tools), text, prompt with "
        "chosen and rejected, or input with preferred_output and non_preferred_output"
    )


def _plain_text(value: object, tokenizer: Tokenizer) -> LearnedText:
    """Return a text with BOS in front where the model wants one, and the end of text where it has one token
    for it.
    """
    if not isinstance(value, str):
        refuse("text", f"must be a string, not {kind_of(value)}")
    ids = tokenizer.encode(value)
    if not ids:
        refuse("text", "is empty")
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
    if len(tokenizer.stop_ids) == 1:
        ids += tokenizer.stop_ids
    if len(ids) < 2:
        refuse("text", "is one token long; there is nothing to predict")
    return LearnedText(tuple(ids), tuple(position > 0 for position in range(len(ids))))


def _chat(
    row: Mapping[str, object], field: str, value: object, tokenizer: Tokenizer, template: ChatTemplate
) -> list[LearnedText]:
    messages, skipped = _messages(field, value)
    if not any(message.get("role") == "assistant" for message in messages):
        refuse(field, "hold no assistant turn to learn")
    if messages[-1].get("role") != "assistant":
        refuse(f"{field}[{len(messages) - 1}].role", "must be assistant: nothing is learned after its turn")
    texts = assistant_texts(template, tokenizer, messages, _tools(row), skipped=skipped)
    return texts or refuse(field, "give every assistant turn the weight 0: nothing is learned")


def _tools(row: Mapping[str, object]) -> Sequence[Tool] | None:
    if not isinstance(row.get("parallel_tool_calls", False), bool):
        refuse("parallel_tool_calls", f"must be true or false, not {kind_of(row['parallel_tool_calls'])}")
    if row.get("tools") in (None, []):
        return None
    parse_tools(cast(Sequence[object], row["tools"]))
    return cast(Sequence[Tool], row["tools"])


def _messages(field: str, value: object) -> tuple[list[Message], frozenset[int]]:
    """Return checked messages, and the numbers of those whose `weight` is 0."""
    if not isinstance(value, list):
        refuse(field, f"must be an array, not {kind_of(value)}")
    messages: list[Message] = []
    skipped: set[int] = set()
    for index, entry in enumerate(cast(list[object], value)):
        if not isinstance(entry, dict):
            refuse(f"{field}[{index}]", f"must be an object, not {kind_of(entry)}")
        message = cast(dict[str, object], entry)
        if "weight" in message:
            weight = message["weight"]
            if message.get("role") != "assistant" or type(weight) is not int or weight not in (0, 1):
                refuse(f"{field}[{index}].weight", "must be 0 or 1, on a message of the assistant")
            if weight == 0:
                skipped.add(index)
            message = {key: item for key, item in message.items() if key != "weight"}
        if message.get("prefix"):
            refuse(
                f"{field}[{index}].prefix", "is for a message that is continued; training needs whole ones"
            )
        messages.append(message)
    try:
        parse_messages(messages, continue_final=False)
    except RequestError as error:
        place = (error.field or "").replace("messages", field, 1)
        raise RequestError(str(error).replace("messages", field, 1), field=place) from None
    return messages, frozenset(skipped)


def _preference(
    row: Mapping[str, object], tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[LearnedText, LearnedText]:
    """Return the chosen and the rejected answer behind their prompt.

    A string stands for one message. Without a prompt, chosen and rejected are whole conversations that differ
    in their last message.
    """
    if "input" in row:  # the form of OpenAI's API
        source = row["input"]
        known = {"messages", "tools", "parallel_tool_calls"}
        if not isinstance(source, dict) or not set(cast(dict[str, object], source)) <= known:
            refuse("input", "must be an object of messages (and tools)")
        context = cast(dict[str, object], source)
        names, place, prompt = (
            ("preferred_output", "non_preferred_output"),
            "input.messages",
            context.get("messages"),
        )
    else:
        names, place, context, prompt = ("chosen", "rejected"), "prompt", row, row.get("prompt")
    answers = [_turns(name, row[name], "assistant") for name in names]
    if "input" in row or "prompt" in row:
        messages = _turns(place, prompt, "user")
        answers = [answer[len(messages) :] if answer[:-1] == messages else answer for answer in answers]
    else:
        place, messages = names[0], answers[0][:-1]
        if answers[1][:-1] != messages:
            refuse(
                names[1], f"must be the conversation of {names[0]} but for its last message, or give `prompt`"
            )
        answers = [answer[-1:] for answer in answers]
    if not messages or messages[-1].get("role") == "assistant":
        refuse(place, "must end with a message that the assistant answers")
    pair: list[LearnedText] = []
    skipped = frozenset(n for n, message in enumerate(messages) if message.get("role") == "assistant")
    for name, answer in zip(names, answers, strict=True):
        if len(answer) != 1 or answer[0].get("role") != "assistant":
            refuse(name, "must be one message of the assistant")
        texts = assistant_texts(template, tokenizer, [*messages, *answer], _tools(context), skipped=skipped)
        pair.append(texts[-1])
    if pair[0] == pair[1]:
        refuse(names[1], f"is the same as {names[0]}: nothing can be preferred")
    return pair[0], pair[1]


def _turns(field: str, value: object, role: str) -> list[Message]:
    """Return the messages of a part of a preference; a string is one message of `role`."""
    return _messages(field, [{"role": role, "content": value}] if isinstance(value, str) else value)[0]


def truncated(texts: Sequence[LearnedText], max_tokens: int) -> tuple[list[LearnedText], int]:
    """Return texts cut to `max_tokens`, those left without a learned token dropped, and how many were cut."""
    cut = [LearnedText(text.ids[:max_tokens], text.learned[:max_tokens]) for text in texts]
    return [text for text in cut if any(text.learned)], sum(len(text.ids) > max_tokens for text in texts)


def histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (upper bound, count) of lengths in tokens, bounds powers of two from 16 on."""
    counts: Counter[int] = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths)
    return sorted(counts.items())
