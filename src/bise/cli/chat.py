"""`bise chat`: a conversation at the terminal, line by line from a pipe, or one message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import (
    load_options,
    model_argument,
    pop_load_options,
    pop_sampling_options,
    read_stdin_text,
    sampling_options,
    settled,
    text,
)
from bise.cli.output import aside, on_terminal
from bise.cli.session import model_name, open_model

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel


@click.command("chat")
@model_argument
@click.option("--message", "-m", type=text, help="Ask this one thing and exit; - reads standard input.")
@click.option("--system", type=text, help="System prompt.")
@click.option(
    "--max-tokens", "-n", type=int, help="Tokens per answer at most.  [default: what the context holds]"
)
@sampling_options
@load_options
@click.option("--no-history", is_flag=True, help="Do not keep typed lines under BISE_HOME.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per answer instead of text.")
def command(model: str | None, **values: Any) -> None:
    """Talk to a model; the embedded one when none is named.

    At a terminal: a prompt with history, multi-line input and commands (/help lists them). With piped
    input each line is answered in turn, as one conversation; with --message there is one answer.
    """
    from bise.cli.repl import Chat, run_lines, run_terminal

    load, sampling = pop_load_options(values), pop_sampling_options(values)
    as_json: bool = values["as_json"]
    message: str | None = values["message"]
    params = sampling.params(max_tokens=values["max_tokens"])
    if message == "-":
        message = read_stdin_text("--message")
    interactive = message is None and not as_json and on_terminal(sys.stdin) and on_terminal(sys.stdout)
    with open_model(model, load) as loaded:
        aside(start_line(loaded))
        settings = settled(params, sampling, loaded)
        chat = Chat(loaded, settings, system=values["system"], as_json=as_json, adapter=load.adapter_name)
        if message is not None:
            chat.reply(message)
        elif interactive:
            run_terminal(chat, keep_history=not values["no_history"])
        else:
            run_lines(chat, sys.stdin.buffer)


def start_line(loaded: LoadedModel) -> str:
    """Return the one line at the start: what model this is and, for the embedded one, what it is not."""
    from bise.hub.embedded import is_embedded

    config = loaded.source.config
    millions = config.num_params / 1e6
    size = f"{millions:.1f} million" if millions < 1000 else f"{millions / 1000:.1f} billion"
    name = model_name(loaded)
    if is_embedded(loaded.source.path):
        return (
            f"{name}: {size} parameters in 8 bits, about a thousandth of a 7B. It holds small talk and makes "
            "mistakes; do not rely on it. For a real one: bise chat PATH (a Mistral 7B directory or .gguf)"
        )
    licence = loaded.source.licence or "not stated"
    context = loaded.engine.max_context
    return f"{name}: {config.family}, {size} parameters, context {context}, licence {licence}"
