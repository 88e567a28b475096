"""A loaded model for the length of one command: resolve the name, load with a bar, close at the end."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bise.cli.output import ProgressBar, aside
from bise.config import user_path
from bise.errors import RequestError

if TYPE_CHECKING:
    from bise.cli.options import LoadOptions
    from bise.engine.load import LoadedModel

Message = Mapping[str, object]


@contextmanager
def open_model(name: str | None, options: LoadOptions) -> Generator[LoadedModel]:
    """Load the model that MODEL means, tell its conversions on standard error, close it at the end."""
    from bise.hub.registry import resolve

    path = resolve(name)
    from bise.engine.load import load_model
    from bise.engine.placement import NATIVE

    with ProgressBar() as bar:
        loaded = load_model(
            path,
            quant=options.quant,
            kv=options.kv,
            threads=options.threads,
            context=options.context,
            draft=None if options.draft is None else resolve(options.draft),
            placement=options.placement or NATIVE,
            progress=bar,
        )
    try:
        if options.adapter is not None and options.adapter_name is not None:
            loaded.load_adapter(options.adapter_name, user_path(options.adapter))
        # The embedded model's own line says that it runs in 8 bits; all else is noted.
        if name is not None or options.quant != "auto":
            for note in loaded.notes:
                aside(f"note: {note}")
        yield loaded
    finally:
        loaded.close()


def model_name(loaded: LoadedModel) -> str:
    """Return what to call the model in output: its own name, else its file's."""
    return loaded.source.name or loaded.source.path.name


def plain_ids(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    """Return the ids of plain text, with BOS where the model wants one; RequestError when nothing remains."""
    tokenizer = loaded.tokenizer
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    ids = (*prefix, *tokenizer.encode(text))
    if not ids:
        raise RequestError(
            "the prompt is empty, and this model starts no text by itself; give it a word", field="prompt"
        )
    return ids


def chat_ids(loaded: LoadedModel, messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the ids of a conversation in the model's own format; RequestError for a model that has none."""
    if loaded.template is None:
        raise RequestError(
            f"{model_name(loaded)} has no chat template (a base model?); use `bise generate --prompt TEXT`",
            field="model",
        )
    return tuple(loaded.template.encode(messages))
