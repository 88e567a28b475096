"""Names of conversations: the question's first words, then a few of the model that answered."""

from __future__ import annotations

import re

from bise.assistant.models import ChatModels, Job, ModelFacts

TITLE_LENGTH = 60
SMALL_PARAMETERS = 1_000_000_000
"""Smaller models follow no instruction about a text reliably."""
_COPY = re.compile(r" \((\d{1,6})\)$")


def is_small(facts: ModelFacts) -> bool:
    """Return True for a model that titles and summaries had better not be trusted to."""
    return facts.is_embedded or (facts.parameters or 0) < SMALL_PARAMETERS


def first_words(text: str) -> str:
    """Return the beginning of a text as a title: one line, cut at a word."""
    line = " ".join(text.split())
    if len(line) <= TITLE_LENGTH:
        return line
    cut = line[:TITLE_LENGTH].rsplit(" ", 1)[0]
    return f"{cut}…"


def next_title(title: str) -> str:
    """Return the title of what follows on a conversation: `Wind` becomes `Wind (2)`, then `Wind (3)`."""
    found = _COPY.search(title)
    number = 2 if found is None else int(found[1]) + 1
    kept = title if found is None else title[: found.start()]
    return f"{first_words(kept)} ({number})" if kept.strip() else ""


async def write_title(
    models: ChatModels, model: str, *, question: str, answer: str, tenant: str, keeps_nothing: bool
) -> str:
    """Return a model's title for a conversation that began so, empty when it wrote none. Raises BiseError."""
    ask = (
        "Name this conversation in at most five words, in its language, without quotes or a full stop."
        f"\n\n{question[:2000]}\n\n{answer[:1000]}"
    )
    job = Job(
        model=model,
        messages=({"role": "user", "content": ask},),
        params={"max_tokens": 24, "temperature": 0.0},
        tenant=tenant,
        priority=10,
        is_aside=True,
        keeps_nothing=keeps_nothing,
    )
    title = "".join([piece.text async for piece in models.stream(job)])
    title = re.sub(r'[*_`#"“”«»]', "", title).strip()
    return first_words(title.splitlines()[0]) if title else ""
