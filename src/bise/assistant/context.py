"""What fills the context window of a conversation's next answer: the figures behind the ribbon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bise.assistant.messages import LIVE, Message
from bise.assistant.models import ChatModels, ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextView:
    """The context window as it stands; token counts are the server's own, with the model's tokenizer."""

    model: str
    window: int | None
    """Tokens that the model can see at once here; None where it is not known."""
    used: int
    segments: tuple[dict[str, Any], ...]
    """kind (system, files, history, turn, answer) and tokens, in order; they add up to `used`."""
    cached: int
    """Prompt tokens that the last answer found in the prefix cache."""
    prompt: int
    """Prompt tokens of the last answer."""
    dropped_first: str | None
    """Id of the oldest message, which would go first if the window overflowed."""
    sliding_window: int | None = None
    """Tokens that one token sees in the layers with a sliding window."""
    dropping: dict[str, Any] | None = None
    """Where it overflows: `messages` and `tokens` of the oldest turns that would have to go, and `keep_from`,
    the id of the first message that could stay (None when not even the last turn fits).
    """


async def view_context(
    models: ChatModels,
    facts: ModelFacts,
    *,
    system: str,
    branch: list[Message],
    prompt: list[dict[str, str]],
    draft: str = "",
) -> ContextView:
    """Return what a conversation fills of a model's window, with `draft` as the next question.

    `prompt` is the branch as the model gets it, documents included.
    """
    messages = [*prompt]
    if draft.strip():
        if messages and messages[-1]["role"] == "user":
            messages.append({"role": "assistant", "content": "…"})
        messages.append({"role": "user", "content": draft})
    counted = {"system": 0, "files": 0, "turn": 0, "answer": 0}
    if system.strip():
        counted["system"] = await models.count_text(facts.id, system)
    if draft.strip():
        counted["turn"] = await models.count_text(facts.id, draft)
    used = await _count(models, facts.id, messages)
    asked = [message for message in branch if message.role == "user"]
    shown = [entry for entry in prompt if entry["role"] == "user"]
    for message, entry in zip(asked, shown[-len(asked) :] if asked else [], strict=False):
        may_have_files = message.documents or message is asked[-1]  # passages stand before the last question
        if may_have_files and len(entry["content"]) > len(message.text):
            extra = entry["content"].replace(message.text, "", 1)
            counted["files"] += await models.count_text(facts.id, extra)
    history = max(0, used - sum(counted.values()))
    order = ("system", "files", "history", "turn")
    segments = [{"kind": kind, "tokens": history if kind == "history" else counted[kind]} for kind in order]
    last = next((message for message in reversed(branch) if message.usage is not None), None)
    usage = {} if last is None or last.usage is None else last.usage
    over = 0 if facts.context is None else used + 1 - facts.context
    return ContextView(
        model=facts.id,
        window=facts.context,
        used=used,
        segments=tuple(segment for segment in segments if segment["tokens"]),
        cached=int(usage.get("cached_tokens", 0)),
        prompt=int(usage.get("prompt_tokens", 0)),
        dropped_first=branch[0].id if branch else None,
        sliding_window=facts.sliding_window,
        dropping=await _dropping(models, facts.id, branch, over) if over > 0 and branch else None,
    )


async def _dropping(models: ChatModels, model: str, branch: list[Message], over: int) -> dict[str, Any]:
    """Return how many of the oldest turns hold at least `over` tokens."""
    tokens = 0
    for index, message in enumerate(branch):
        if tokens >= over and message.role == "user":
            return {"messages": index, "tokens": tokens, "keep_from": message.id}
        tokens += await models.count_text(model, message.text)
    return {"messages": len(branch), "tokens": tokens, "keep_from": None}


async def _count(models: ChatModels, model: str, messages: list[dict[str, str]]) -> int:
    if not any(message["role"] == "user" for message in messages):
        return sum([await models.count_text(model, message["content"]) for message in messages])
    return await models.count(model, messages, continues=messages[-1]["role"] == "assistant")


def is_writing(branch: list[Message]) -> bool:
    """Return True while the branch's last answer is being written."""
    return bool(branch) and branch[-1].status in LIVE
