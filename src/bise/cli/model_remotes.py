"""`bise models add-remote`: put a model that another machine hosts on the list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import text
from bise.cli.output import aside

if TYPE_CHECKING:
    from bise.hub.remotes import RemoteSpec


@click.command("add-remote")
@click.argument("name", type=text)
@click.option("--url", required=True, type=text, help="Up to and with the version: https://HOST/v1.")
@click.option("--model", required=True, type=text, help="What the host calls it.")
@click.option("--key-env", type=text, metavar="VARIABLE", help="Environment variable with the host's key.")
@click.option(
    "--dialect", type=click.Choice(["openai", "mistral"]), default="openai", show_default=True,
    help="Which of the two the host insists on where they differ.",
)  # fmt: skip
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds of patience.")
@click.option(
    "--max-tokens", type=int, default=4096, show_default=True, help="Of an answer that names no limit."
)
@click.option(
    "--serves", multiple=True, type=click.Choice(["chat", "embeddings", "completions", "fim"]),
    help="What the host has; may be repeated.  [default: chat, embeddings]",
)  # fmt: skip
def add_remote(
    name: str,
    url: str,
    model: str,
    key_env: str | None,
    dialect: str,
    timeout: float,
    max_tokens: int,
    serves: tuple[str, ...],
) -> None:
    """List a model that another machine hosts as NAME.

    Nothing is sent there until `bise serve --remote NAME`. Its key stays in the environment.
    """
    from bise.errors import UserError
    from bise.hub.registry import known_models, local_models
    from bise.hub.remotes import DEFAULT_ENDPOINTS, RemoteSpec
    from bise.hub.remotes import add_remote as add

    here = {"brise", *(path.stem if path.suffix == ".gguf" else path.name for path in local_models())}
    if name in here | {known.alias for known in known_models()}:
        raise UserError(
            f"'{name}' is the name of a local model; choose another, so that nobody mistakes them"
        )
    add(
        RemoteSpec(
            name=name, url=url, model=model, key_env=key_env, dialect=dialect, timeout_s=timeout,
            max_tokens=max_tokens, serves=serves or DEFAULT_ENDPOINTS,
        )
    )  # fmt: skip
    aside(f"prompts to {name} will leave this machine once it is served with `bise serve --remote {name}`")


def remote_rows(specs: Iterable[RemoteSpec]) -> list[dict[str, Any]]:
    """Return the hosted models as `bise models --json` lists them."""
    return [
        {
            "name": spec.name,
            "url": spec.url,
            "model": spec.model,
            "key_env": spec.key_env,
            "dialect": spec.dialect,
            "serves": list(spec.serves),
            "leaves_this_machine": True,
        }
        for spec in specs
    ]
