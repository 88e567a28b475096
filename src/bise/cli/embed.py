"""`bise embed`: texts as unit vectors, one JSON object per text, in the file's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import load_options, pop_load_options, text
from bise.cli.output import write_json
from bise.cli.score import IN_FLIGHT, read_rows
from bise.cli.session import open_model, plain_ids
from bise.errors import UserError

if TYPE_CHECKING:
    from bise.engine.handle import RequestHandle
    from bise.engine.load import LoadedModel
    from bise.engine.request import Completion


@click.command("embed")
@click.argument("names", nargs=-1, type=text, metavar="[MODEL] [FILE]")
@click.option("--text", "-t", "texts", multiple=True, type=text, help="A text; may be repeated.")
@click.option(
    "--pooling",
    type=click.Choice(["last", "mean"]),
    default="mean",
    show_default=True,
    help="The final hidden state of the last token, or the mean over all tokens.",
)
@load_options
def command(names: tuple[str, ...], **values: Any) -> None:
    """Turn texts into unit vectors.

    FILE is JSONL (- reads standard input), each row {"text": ...}; or give texts with --text. One JSON object
    per text: embedding, tokens. The dot product of two vectors is the cosine of their angle.
    """
    load = pop_load_options(values)
    texts = list(values["texts"])
    most = 1 if texts else 2
    if len(names) > most or (not texts and not names):
        raise click.UsageError("give a FILE, or a MODEL and a FILE, or --text TEXT")
    if not texts:
        texts = _texts(names[-1])
    with open_model(names[0] if len(names) == most else None, load) as loaded:
        prompts = [plain_ids(loaded, content) for content in texts]
        for done in _embed(loaded, prompts, values["pooling"], load.adapter_name):
            write_json({"embedding": list(done.embedding), "tokens": done.usage.prompt_tokens})


def _texts(name: str) -> list[str]:
    rows = read_rows(name)
    for number, row in rows:
        if "text" not in row:
            raise UserError(f'{name}: line {number} is a chat; a row to embed is {{"text": ...}}')
    return [row["text"] for _, row in rows]


def _embed(
    loaded: LoadedModel, prompts: list[tuple[int, ...]], pooling: Any, adapter: str | None
) -> Iterator[Completion]:
    """Yield what the engine returns for each prompt, in order, a few in flight at a time."""
    from bise.engine.request import Request, SamplingParams

    waiting: deque[RequestHandle] = deque()
    try:
        for token_ids in prompts:
            params = SamplingParams(max_tokens=0)
            request = Request(token_ids=token_ids, params=params, pooling=pooling, adapter=adapter)
            waiting.append(loaded.engine.submit(request))
            if len(waiting) >= IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for handle in waiting:
            handle.cancel()
