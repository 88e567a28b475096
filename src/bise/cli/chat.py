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


_WEB_OPTIONS = (
    "quant", "kv", "threads", "context", "device", "dtype", "device_memory", "gpu_layers", "offload",
)  # fmt: skip
"""What `--web` hands on to `bise serve`."""


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
@click.option("--web", is_flag=True, help="Open the assistant in the browser, served by this machine alone.")
def command(model: str | None, **values: Any) -> None:
    """Talk to a model; the embedded one when none is named.

    At a terminal: a prompt with history, multi-line input and commands (/help lists them). With piped
    input each line is answered in turn, as one conversation; with --message there is one answer.
    """
    if values.pop("web"):
        _open_page(click.get_current_context(), model)
        return
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


def _open_page(context: click.Context, model: str | None) -> None:
    """Serve the model on a free loopback port and open its page; refuses options that the page has itself."""
    from click.core import ParameterSource

    from bise.cli.serve import command as serve

    for param in context.command.params:
        name = param.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("model", "web", *_WEB_OPTIONS):
            raise click.UsageError(f"{param.opts[0]} does not go with --web; set it on the page")
    load = {name: context.params[name] for name in _WEB_OPTIONS}
    models = () if model is None else (model,)
    context.invoke(serve, models=models, port=0, open_page=True, **load)


def start_line(loaded: LoadedModel) -> str:
    """Return the one line at the start: what model this is and, for the embedded one, what it is not."""
    from bise.hub.embedded import is_embedded

    config = loaded.source.config
    millions = config.num_params / 1e6
    size = f"{millions:.1f} million" if millions < 1000 else f"{millions / 1000:.1f} billion"
    name = model_name(loaded)
    if is_embedded(loaded.source.path):
        return (
            f"{name}: {size} parameters in 8 bits, about a six-hundredth of a 7B. It holds small talk and "
            "makes mistakes; do not rely on it. For a real one: "
            "bise chat PATH (a Mistral 7B directory or .gguf)"
        )
    licence = loaded.source.licence or "not stated"
    context = loaded.engine.max_context
    return f"{name}: {config.family}, {size} parameters, context {context}, licence {licence}"
