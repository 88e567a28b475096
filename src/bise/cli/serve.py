"""`bise serve`: the API of Mistral and OpenAI on this machine."""

from __future__ import annotations

import ipaddress
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import kv_option, quant_option, text
from bise.cli.output import aside
from bise.errors import ConfigError

if TYPE_CHECKING:
    from bise.engine.model_spec import ModelSpec

DEFAULT_PORT = 8000
DEFAULT_SEQUENCES = 8


@click.command("serve")
@click.argument("models", nargs=-1, type=text, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, type=text, help="Address to listen on.")
@click.option(
    "--port",
    default=DEFAULT_PORT,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one.",
)
@click.option("--alias", "aliases", multiple=True, type=text, help="ALIAS=MODEL: a further name of a model.")
@click.option("--allow-host", "hosts", multiple=True, type=text, help="A host name this server answers to.")
@click.option("--allow-origin", "origins", multiple=True, type=text, help="A site whose pages may call it.")
@quant_option()
@kv_option()
@click.option(
    "--context", type=click.IntRange(min=1), help="Most tokens of a request.  [default: the model's]"
)
@click.option(
    "--sequences",
    type=click.IntRange(1, 1024),
    default=DEFAULT_SEQUENCES,
    show_default=True,
    help="Requests that can reach the full context at once.",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Worker threads.  [default: all cores]")
@click.option(
    "--memory", type=click.FloatRange(min=0.01), help="GiB for all models together.  [default: what is free]"
)
@click.option("--idle", type=click.FloatRange(min=1), help="Unload a model unused for so many seconds.")
@click.option(
    "--grace", type=click.FloatRange(0, 3600), default=30.0, show_default=True,
    help="Seconds that running requests get when the server is told to stop.",
)  # fmt: skip
@click.option("--open", "open_page", is_flag=True, help="Open the assistant in the browser.")
@click.option("--no-key", is_flag=True, help="Serve other machines without asking for a key.")
def command(models: tuple[str, ...], **values: Any) -> None:
    """Serve models over Mistral's and OpenAI's API.

    Without MODEL the embedded one is served. Several models share the memory; each is loaded at its first
    request (a single one at once).
    """
    import asyncio

    from bise.engine.fleet import Fleet
    from bise.server.app import create_app
    from bise.server.assistant_app import assistant_routers
    from bise.server.edge import Reach
    from bise.server.limits import HttpLimits
    from bise.server.serving import Serving, bind, url_of
    from bise.store.database import Database

    if not values["no_key"] and not _is_loopback(values["host"]):
        raise ConfigError(
            f"{values['host']} is reachable from other machines and no key is asked for; listen on "
            "127.0.0.1, or say --no-key",
            field="host",
        )
    specs = _specs(models or (None,), values)
    memory = None if values["memory"] is None else int(values["memory"] * 2**30)
    listener = bind(values["host"], values["port"])
    with listener, closing(Database.open()) as database, Fleet(specs, memory, values["idle"]) as fleet:
        if len(specs) == 1:
            fleet.wake(specs[0].name)
        for card in fleet.cards():
            if card.fault is not None:
                aside(f"note: {card.spec.name} cannot be served: {card.fault}")
        limits = HttpLimits()
        reach = Reach(
            hosts=frozenset(name.lower() for name in (*values["hosts"], values["host"])),
            origins=frozenset(values["origins"]),
        )
        app = create_app(fleet, limits=limits, reach=reach, routers=assistant_routers(fleet, database))
        names = ", ".join(fleet.names())

        def ready() -> None:
            click.echo(f"bise serves {names} at {url_of(listener)}/v1")
            click.echo(f"the assistant is at {url_of(listener)}/")
            if values["open_page"]:
                click.launch(f"{url_of(listener)}/")
            click.get_text_stream("stdout").flush()

        serving = Serving(app, limits=limits, grace_s=values["grace"], on_ready=ready)
        try:
            asyncio.run(serving.serve(sockets=[listener]))
        finally:
            app.service.close()


def _specs(models: tuple[str | None, ...], values: dict[str, Any]) -> list[ModelSpec]:
    """Return what the fleet is to serve, in the order of the command line."""
    from bise.engine.model_spec import ModelSpec
    from bise.hub.registry import resolve

    aliases: dict[str, list[str]] = {}
    for entry in values["aliases"]:
        alias, sign, model = entry.partition("=")
        if not sign or not alias or not model:
            raise click.UsageError(f"--alias needs ALIAS=MODEL, got '{entry}'")
        aliases.setdefault(model, []).append(alias)
    specs: list[ModelSpec] = []
    for model in models:
        path = resolve(model)
        name = path.stem if path.suffix == ".gguf" else path.resolve().name
        known = {name, model or name}
        specs.append(
            ModelSpec(
                name=name,
                path=path,
                quant=values["quant"],
                kv=values["kv"],
                context=values["context"],
                sequences=values["sequences"],
                threads=values["threads"],
                aliases=tuple(alias for key in sorted(known) for alias in aliases.pop(key, ())),
            )
        )
    if aliases:
        raise click.UsageError(f"--alias names a model that is not served: {', '.join(sorted(aliases))}")
    return specs


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
