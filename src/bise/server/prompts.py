"""Prompts that are text or tokens: counted, encoded, and put around a gap for fill-in-the-middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from bise.errors import RequestError
from bise.server.service import Job
from bise.text.tokenizer import Tokenizer

_MARK = "☺"
"""A piece that is put before a text so that it does not get the dummy space of a text's beginning."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it and as people read it."""

    token_ids: tuple[int, ...]
    text: str


def prompts_of(
    job: Job, value: str | Sequence[object], field: str, *, may_shorten: bool = False
) -> list[Prompt]:
    """Return the prompts of one text, several, one list of tokens or several; with `may_shorten` they may be
    longer than the context. Raises RequestError.
    """
    if isinstance(value, str):
        return [text_prompt(job, value, field, may_shorten=may_shorten)]
    if isinstance(value[0], int):
        return [_token_prompt(job, cast(Sequence[int], value), field)]
    if isinstance(value[0], str):
        return [text_prompt(job, text, field, may_shorten=may_shorten) for text in cast(Sequence[str], value)]
    return [_token_prompt(job, ids, field) for ids in cast(Sequence[Sequence[int]], value)]


def text_prompt(job: Job, text: str, field: str, *, may_shorten: bool = False) -> Prompt:
    """Return a text with BOS where the model wants one. Raises RequestError when nothing remains."""
    if not may_shorten:
        job.check_size(len(text.encode()))
    tokenizer = job.loaded.tokenizer
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    ids = (*start, *tokenizer.encode(text))
    if not ids:
        raise RequestError(f"{field} is empty, and this model starts no text by itself", field=field)
    return Prompt(ids, text)


def _token_prompt(job: Job, ids: Sequence[int], field: str) -> Prompt:
    tokenizer = job.loaded.tokenizer
    if max(ids) >= tokenizer.vocab_size:
        raise RequestError(
            f"{field} has token {max(ids)}; the vocabulary has {tokenizer.vocab_size}", field=field
        )
    return Prompt(tuple(ids), tokenizer.decode(ids))


def fim_prompt(job: Job, prompt: str, suffix: str) -> Prompt:
    """Return Mistral's fill-in-the-middle form: BOS, [SUFFIX] suffix, [PREFIX] prompt.

    Raises RequestError for a model whose vocabulary has no such tokens.
    """
    job.check_size(len(prompt.encode()) + len(suffix.encode()))
    tokenizer = job.loaded.tokenizer
    before, after = tokenizer.control_id("[PREFIX]"), tokenizer.control_id("[SUFFIX]")
    if before is None or after is None or tokenizer.bos_id is None:
        raise RequestError(f"{job.model} was not made to fill in the middle of a text", field="suffix")
    middle = (after, *_inner_ids(tokenizer, suffix), before, *tokenizer.encode(prompt))
    return Prompt((tokenizer.bos_id, *middle), prompt)


def _inner_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that goes on in the middle of another one."""
    if not text or not tokenizer.space_prefix:
        return tokenizer.encode(text) if text else []
    ids = tokenizer.encode(_MARK + text)
    left = len(_MARK.encode())
    for index, token_id in enumerate(ids):
        left -= len(tokenizer.token_bytes(token_id).removeprefix(b" "))
        if left <= 0:
            return ids[index + 1 :]
    return ids
