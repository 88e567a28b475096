"""`bise generate`: continue a prompt, as text while it comes or as one JSON object."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from bise.cli.answer import ask, ignore_text, logprob_rows
from bise.cli.grammar_options import grammar_options, pop_grammar
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
from bise.cli.output import aside, on_terminal, write_json, write_text
from bise.cli.session import model_name, open_model, plain_ids

DEFAULT_MAX_TOKENS = 256


@click.command("generate")
@model_argument
@click.option(
    "--prompt", "-p", required=True, type=text, help="The text to continue; - reads standard input."
)
@click.option(
    "--max-tokens",
    "-n",
    type=int,
    help="Tokens to produce at most.  [default: 256, or what the context still holds]",
)
@sampling_options
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end of text.")
@click.option(
    "--logprobs", type=int, help="With --json: log-probs of each token and of the N likeliest (0 to 20)."
)
@grammar_options
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option(
    "--receipt",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what `bise replay` needs to confirm the output; it holds the prompt as token ids.",
)
@click.option(
    "--receipt-without-prompt", is_flag=True, help="Leave the prompt and the grammar out of the receipt."
)
def command(model: str | None, **values: Any) -> None:
    """Continue a prompt.

    The prompt is taken as it is, without a chat template (see `bise chat --message`).
    """
    from bise.engine.receipt import make_receipt, receipt_params, write_receipt
    from bise.engine.request import FinishReason, Request

    load, sampling = pop_load_options(values), pop_sampling_options(values)
    grammar = pop_grammar(values)
    prompt: str = values["prompt"]
    as_json: bool = values["as_json"]
    if values["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    params = sampling.params(
        max_tokens=values["max_tokens"], logprobs=values["logprobs"], ignore_eos=values["ignore_eos"]
    )
    receipt: Path | None = values["receipt"]
    if receipt is not None and load.placement is not None and not load.placement.is_native:
        raise click.UsageError("--receipt is for bise's own kernels; leave --device and --dtype away")
    _check_receipt(receipt, without_prompt=values["receipt_without_prompt"])
    if prompt == "-":
        prompt = read_stdin_text("--prompt")
    with open_model(model, load) as loaded:
        params = settled(params, sampling, loaded)
        ids = plain_ids(loaded, prompt)
        room = loaded.engine.max_context - len(ids)
        if params.max_tokens is None and room > DEFAULT_MAX_TOKENS:
            params = replace(params, max_tokens=DEFAULT_MAX_TOKENS)
        if receipt is not None:
            params = receipt_params(params, room)
        request = Request(
            token_ids=ids,
            params=params,
            continuation=bool(prompt),
            adapter=load.adapter_name,
            grammar=grammar,
        )
        answer = ask(loaded, request, ignore_text if as_json else write_text)
        if receipt is not None:
            made = make_receipt(
                loaded,
                request,
                answer.logprobs,
                answer.finish_reason,
                keeps_prompt=not values["receipt_without_prompt"],
            )
            write_receipt(made, receipt)
        if as_json:
            fields: dict[str, Any] = {"text": answer.text, "token_ids": answer.token_ids}
            if values["logprobs"] is not None:
                fields["logprobs"] = logprob_rows(answer.logprobs)
            counts = loaded.expert_counts()
            if counts is not None:
                fields["experts"] = asdict(counts) | {"hit_rate": counts.hit_rate}
            write_json(fields | answer.report() | {"model": model_name(loaded), "seed": sampling.seed})
            return
        write_text("\n")
        if answer.finish_reason == FinishReason.LENGTH:
            count = len(answer.token_ids)
            tokens = "1 token" if count == 1 else f"{count} tokens"
            aside(f"(stopped by the limit of {tokens}; --max-tokens raises it)")
        if on_terminal(sys.stderr):
            aside(answer.speed_line(loaded.engine.max_context))


def _check_receipt(receipt: Path | None, *, without_prompt: bool) -> None:
    """Refuse, before any work, a receipt that could not be written."""
    if receipt is None:
        if without_prompt:
            raise click.UsageError("--receipt-without-prompt needs --receipt FILE")
        return
    if receipt.exists() or receipt.is_symlink():
        raise click.UsageError(f"--receipt {receipt} exists; remove it or name another file")
    if not receipt.absolute().parent.is_dir():
        raise click.UsageError(f"--receipt {receipt}: there is no such folder")
