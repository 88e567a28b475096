"""Which tokens of a conversation the assistant wrote, found through the model's own chat format.

The prompt before a turn is what the format makes of the messages before it; the turn is what the format adds.
Formats that write earlier turns differently once more turns follow (a system prompt that moves, tools shown
before the last question) give several texts, one for each prompt that the model would really see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from bise.text.messages import refuse
from bise.text.mistral_template import MistralTemplate
from bise.text.template import ChatTemplate, Message, Tool
from bise.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LearnedText:
    """Tokens, and which of them count for the loss."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    """Never the first: nothing predicts it."""


def assistant_texts(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    skipped: frozenset[int] = frozenset(),
) -> list[LearnedText]:
    """Return a conversation as the model sees it, the assistant's turns learned, end-of-turn tokens included.

    Example: user "a", assistant "b": ids `<s> [INST] a [/INST] b </s>`, learned 0 0 0 0 1 1.
    Turns numbered in `skipped` are shown but not learned. RequestError names the place for what the format
    cannot say, and when it does not tell where a turn ends.
    """
    texts: list[LearnedText] = []
    ids: tuple[int, ...] = ()
    learned: list[bool] = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index == 0 or messages[index - 1].get("role") == "assistant":
            refuse(f"messages[{index}].role", "is assistant; a turn of the assistant answers somebody else's")
        before = tuple(template.encode(messages[:index], tools))
        closed = _closed_turn(template, tokenizer, messages[: index + 1], tools)
        if closed[: len(before)] != before or len(closed) == len(before):
            refuse(f"messages[{index}]", "is not told from its prompt by this model's chat format")
        if before[: len(ids)] != ids:
            texts.append(LearnedText(ids, tuple(learned)))
            learned = []
        learned += [False] * (len(before) - len(learned))
        learned += [index not in skipped] * (len(closed) - len(before))
        ids = closed
    return [text for text in [*texts, LearnedText(ids, tuple(learned))] if any(text.learned)]


def _closed_turn(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[int, ...]:
    """Return the ids of a conversation whose last turn is the assistant's, up to the end of that turn."""
    if isinstance(template, MistralTemplate):
        end = cast(int, tokenizer.control_id("</s>"))
        return (*template.encode(messages, tools, continue_final=True), end)
    # What two different continuations have in common ends after the turn; its last stop token closes it.
    first, second = (template.encode([*messages, *_followers(messages[-1], text)], tools) for text in "12")
    same = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    ends = [n for n in range(same) if first[n] in tokenizer.stop_ids]
    if not ends:
        refuse(
            f"messages[{len(messages) - 1}]",
            "cannot be learned: this model's chat format ends a turn without a stop token",
        )
    return tuple(first[: ends[-1] + 1])


def _followers(message: Message, text: str) -> list[Message]:
    """Return messages that may follow the assistant's: results for its calls, else a question."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple) or not calls:
        return [{"role": "user", "content": text}]
    return [
        {"role": "tool", "tool_call_id": call.get("id"), "content": text}
        for call in cast(Sequence[Mapping[str, object]], calls)
    ]
