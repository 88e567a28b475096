"""`bise replay`: make an output again from its receipt, and say whether it is the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bise.cli.grammar_options import grammar_options, pop_grammar
from bise.cli.options import LoadOptions, read_stdin_text, text
from bise.cli.output import aside
from bise.cli.session import model_name, open_model, plain_ids


@click.command("replay")
@click.argument("receipt", type=click.Path(path_type=Path), metavar="RECEIPT")
@click.option(
    "--model", "-m", type=text, help="The model to replay with.  [default: the embedded one, as everywhere]"
)
@click.option(
    "--prompt", "-p", type=text, help="The prompt, where the receipt leaves it out; - reads standard input."
)
@click.option(
    "--adapter", type=text, metavar="DIR", help="The LoRA adapter, where the output was made with one."
)
@grammar_options
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: BISE_THREADS or all cores]"
)
def command(
    receipt: Path,
    model: str | None,
    prompt: str | None,
    adapter: str | None,
    threads: int | None,
    **values: Any,
) -> None:
    """Run the request of a receipt again and compare every token and log-prob.

    A grammar is given only where the receipt leaves it out.

    Exits 0 when the output is the same to the last bit, 1 with what differs when it is not.
    """
    from bise.engine.receipt import model_differences, output_difference, read_receipt, replay_request

    grammar = pop_grammar(values)
    wanted = read_receipt(receipt)
    if prompt == "-":
        prompt = read_stdin_text("--prompt")
    load = LoadOptions(quant=wanted.quant, kv=wanted.kv, threads=threads, context=None, adapter=adapter)
    with open_model(model, load) as loaded:
        differences = model_differences(wanted, loaded, load.adapter_name)
        name = model_name(loaded)
        if differences:
            if model is None and wanted.model.name != name:
                aside(f"(the receipt is of {wanted.model.name}; --model PATH names it)")
            _fail("; ".join(differences))
        prompt_ids = None if prompt is None else plain_ids(loaded, prompt)
        request = replay_request(wanted, prompt_ids, grammar=grammar, adapter=load.adapter_name)
        done = loaded.engine.submit(request).result()
        difference = output_difference(wanted, done.logprobs, done.finish_reason.value)
    if difference is not None:
        _fail(difference)
    tokens = f"{wanted.num_tokens} token{'' if wanted.num_tokens == 1 else 's'}"
    click.echo(f"same: {tokens}, log-probs included, bit for bit ({name})")


def _fail(reason: str) -> None:
    click.echo(f"different: {reason}")
    raise click.exceptions.Exit(1)
