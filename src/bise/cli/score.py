"""`bise score`: log-probs and perplexity of texts and chats, one JSON object per row, in the file's order."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import click

from bise.cli.options import load_options, pop_load_options, text
from bise.cli.output import ProgressBar, write_json, write_table
from bise.cli.session import Message, chat_ids, open_model, plain_ids
from bise.cli.transcript import check_messages
from bise.config import user_path
from bise.errors import RequestError, UserError

if TYPE_CHECKING:
    from bise.engine.handle import RequestHandle
    from bise.engine.load import LoadedModel
    from bise.engine.request import Completion

IN_FLIGHT = 16
"""Rows given to the engine at a time; it batches them."""
SHOWN_ERRORS = 5
"""Bad rows named in an error line; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file, ready to score."""

    number: int
    """Line number, from 1."""
    token_ids: tuple[int, ...]
    counted: tuple[bool, ...]
    """True for the tokens that the perplexity is over; never the first."""


@click.command("score")
@click.argument("names", nargs=-1, type=text, metavar="[MODEL] FILE")
@load_options
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per row: token_ids, logprobs, perplexity."
)
def command(names: tuple[str, ...], **values: Any) -> None:
    """Give the log-probs and perplexity of texts or chats.

    FILE is JSONL (- reads standard input); each row is {"text": ...} or {"messages": [...]}. Log-probs are
    natural, the first is null. A chat's perplexity is over the assistant's turns only, the end-of-turn token
    included.
    """
    if not 1 <= len(names) <= 2:
        raise click.UsageError("give a FILE, or a MODEL and a FILE")
    load = pop_load_options(values)
    as_json: bool = values["as_json"]
    entries = read_rows(names[-1])
    with open_model(names[0] if len(names) == 2 else None, load) as loaded, ProgressBar() as bar:
        rows = prepare_rows(names[-1], entries, loaded)
        reports: list[dict[str, Any]] = []
        for done, (row, completion) in enumerate(score_rows(rows, loaded, load.adapter_name), 1):
            bar("scoring", done / len(rows))
            reports.append(row_report(row, completion))
            if as_json:
                write_json(reports.pop())
    if not as_json:
        _write_summary(rows, reports)


def _write_summary(rows: list[Row], reports: list[dict[str, Any]]) -> None:
    lines = [
        [
            str(row.number),
            str(len(row.token_ids)),
            str(report["counted_tokens"]),
            _shown(report["perplexity"]),
        ]
        for row, report in zip(rows, reports, strict=True)
    ]
    counted = sum(report["counted_tokens"] for report in reports)
    loss = math.fsum(math.log(r["perplexity"]) * r["counted_tokens"] for r in reports if r["counted_tokens"])
    total = math.exp(loss / counted) if counted else None
    lines.append(["all", str(sum(len(row.token_ids) for row in rows)), str(counted), _shown(total)])
    write_table(["ROW", "TOKENS", "COUNTED", "PERPLEXITY"], lines)


def _shown(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.3f}"


def read_rows(name: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, checked object) of each non-empty line; UserError naming the bad lines."""
    entries: list[tuple[int, dict[str, Any]]] = []
    bad: list[str] = []
    for number, raw in enumerate(_lines(name), 1):
        if not raw.strip():
            continue
        try:
            entries.append((number, parse_row(raw, f"line {number}")))
        except UserError as error:
            bad.append(str(error))
    _refuse_bad(name, bad)
    if not entries:
        raise UserError(f"{name}: no rows to score")
    return entries


def _lines(name: str) -> list[bytes]:
    if name == "-":
        return sys.stdin.buffer.read().split(b"\n")
    path = user_path(name)
    try:
        # A pipe such as <(head rows.jsonl) is welcome; a device never ends.
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise UserError(f"{name}: is neither a file nor a pipe")
        return path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{name}: cannot be read ({reason})") from error


def _refuse_bad(name: str, bad: list[str]) -> None:
    if bad:
        more = f"; and {len(bad) - SHOWN_ERRORS} more" if len(bad) > SHOWN_ERRORS else ""
        raise UserError(f"{name}: " + "; ".join(bad[:SHOWN_ERRORS]) + more)


def parse_row(raw: bytes, where: str) -> dict[str, Any]:
    """Return one checked row; UserError says what is wrong with it, and `where`."""
    from bise.jsonfile import parse_json

    value = parse_json(raw, where)
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object")
    row = cast("dict[str, Any]", value)
    if ("text" in row) == ("messages" in row):
        raise UserError(f'{where}: give either "text" or "messages"')
    if "text" in row:
        if not isinstance(row["text"], str):
            raise UserError(f'{where}: "text" is not a string')
        return row
    messages = check_messages(row["messages"], where)
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: messages hold no assistant turn to score")
    return row


def prepare_rows(name: str, entries: list[tuple[int, dict[str, Any]]], loaded: LoadedModel) -> list[Row]:
    """Return the tokens of every row; UserError naming the rows that this model cannot take."""
    rows: list[Row] = []
    bad: list[str] = []
    context = loaded.engine.max_context
    for number, entry in entries:
        try:
            ids, counted = row_tokens(entry, loaded)
            if len(ids) > context:
                raise RequestError(f"{len(ids)} tokens exceed the context of {context}")
            rows.append(Row(number, ids, counted))
        except RequestError as error:
            bad.append(f"line {number}: {error}")
    _refuse_bad(name, bad)
    return rows


def row_tokens(entry: dict[str, Any], loaded: LoadedModel) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the ids of a row, and for each whether the perplexity counts it."""
    if "text" in entry:
        ids = plain_ids(loaded, entry["text"])
        return ids, tuple(position > 0 for position in range(len(ids)))
    return assistant_tokens(entry["messages"], loaded)


def assistant_tokens(
    messages: list[Message], loaded: LoadedModel
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the ids of a chat up to its last assistant turn, and which of them the assistant wrote.

    Example: user "a", assistant "b": ids `<s> [INST] a [/INST] b </s>`, counted 0 0 0 0 1 1. RequestError
    when the format writes earlier turns differently once more turns follow: then no one sequence holds all.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    ids: tuple[int, ...] = ()
    spans: list[tuple[int, int]] = []
    for i in range(last + 1):
        if messages[i]["role"] != "assistant":
            continue
        before = chat_ids(loaded, messages[:i])
        closed = closed_turn(loaded, messages[: i + 1])
        if before[: len(ids)] != ids or closed[: len(before)] != before:
            raise RequestError(
                f"messages[{i}]: this model's chat format rewrites earlier turns when a new one follows "
                "(such as moving the system prompt); score the turns as rows of their own"
            )
        ids = closed
        spans.append((len(before), len(ids)))
    return ids, tuple(any(start <= p < stop for start, stop in spans) for p in range(len(ids)))


def closed_turn(loaded: LoadedModel, messages: list[Message]) -> tuple[int, ...]:
    """Return the ids of a chat whose last message is the assistant's, its end-of-turn token included."""
    ids = tuple(loaded.template.encode(messages, continue_final=True)) if loaded.template else ()
    followed = chat_ids(loaded, [*messages, {"role": "user", "content": "."}])
    if (
        followed[: len(ids)] == ids
        and len(followed) > len(ids)
        and followed[len(ids)] in loaded.tokenizer.stop_ids
    ):
        return (*ids, followed[len(ids)])
    return ids


def score_rows(
    rows: list[Row], loaded: LoadedModel, adapter: str | None = None
) -> Iterator[tuple[Row, Completion]]:
    """Score rows a few at a time and yield them in order."""
    from bise.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=0, temperature=0)
    waiting: deque[tuple[Row, RequestHandle]] = deque()
    try:
        for row in rows:
            request = Request(token_ids=row.token_ids, params=params, prompt_logprobs=True, adapter=adapter)
            waiting.append((row, loaded.engine.submit(request)))
            if len(waiting) >= IN_FLIGHT:
                first, handle = waiting.popleft()
                yield first, handle.result()
        while waiting:
            first, handle = waiting.popleft()
            yield first, handle.result()
    finally:
        for _, handle in waiting:
            handle.cancel()


def row_report(row: Row, completion: Completion) -> dict[str, Any]:
    """Return the JSON of a scored row; perplexity is null when no token counts."""
    logprobs = [entry and entry.logprob for entry in completion.prompt_logprobs]
    pairs = zip(logprobs, row.counted, strict=True)
    counted = [value for value, counts in pairs if counts and value is not None]
    return {
        "token_ids": list(row.token_ids),
        "logprobs": logprobs,
        "perplexity": math.exp(-math.fsum(counted) / len(counted)) if counted else None,
        "counted_tokens": len(counted),
    }
