"""`bise serve`: the API of Mistral and OpenAI on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from bise.cli.logs import configure
from bise.cli.options import Gibibytes, device_options, kv_option, pop_placement, quant_option, text
from bise.cli.output import aside

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from bise.engine.fleet import Fleet
    from bise.engine.model_spec import AdapterSpec, ModelSpec
    from bise.engine.placement import Placement
    from bise.server.access import Access
    from bise.server.hosted import HostedModels
    from bise.store.opening import Store

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
@click.option(
    "--adapter", "adapters", multiple=True, type=text,
    help="[MODEL:]NAME=DIR: a LoRA adapter, asked for as MODEL:NAME; without MODEL: of the first one.",
)  # fmt: skip
@click.option(
    "--draft", "drafts", multiple=True, type=text, metavar="[MODEL=]DRAFT",
    help="A small model that guesses ahead for MODEL (else for the first one), of the same vocabulary; the "
    "output is the same, sooner.",
)  # fmt: skip
@click.option("--allow-host", "hosts", multiple=True, type=text, help="A host name this server answers to.")
@click.option("--allow-origin", "origins", multiple=True, type=text, help="A site whose pages may call it.")
@click.option(
    "--remote", "remotes", multiple=True, type=text,
    help="A hosted model of `bise models add-remote`; prompts to it leave this machine.",
)  # fmt: skip
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
@device_options
@click.option(
    "--memory",
    type=Gibibytes(),
    help="For all models together, such as 16GiB; a plain number counts GiB.  [default: what is free]",
)
@click.option("--idle", type=click.FloatRange(min=1), help="Unload a model unused for so many seconds.")
@click.option(
    "--prefix-cache", type=text,
    help="Directory in which cached beginnings of prompts outlast a restart, up to 1 GiB per model.",
)  # fmt: skip
@click.option(
    "--swap", type=Gibibytes(),
    help="Per model, for what preempted requests leave; a plain number counts GiB.  [default: it is computed "
    "again]",
)  # fmt: skip
@click.option(
    "--grace", type=click.FloatRange(0, 3600), default=30.0, show_default=True,
    help="Seconds that running requests get when the server is told to stop.",
)  # fmt: skip
@click.option(
    "--example", "examples", multiple=True, type=text,
    help="A question that the assistant's empty screen offers, up to 4.  [default: the page's own]",
)  # fmt: skip
@click.option("--open", "open_page", is_flag=True, help="Open the assistant in the browser.")
@click.option("--db", type=text, help="Database: a path or postgresql://...  [default: bise.db in BISE_HOME]")
@click.option("--no-key", is_flag=True, help="Ask nobody for a key, not even on a public address.")
@click.option("--require-key", is_flag=True, help="Ask for a key on this machine too, from the start.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="What the log on standard error tells; never a user's text.",
)
def command(models: tuple[str, ...], **values: Any) -> None:
    """Serve models over Mistral's and OpenAI's API.

    Without MODEL the embedded one is served. Several models share the memory; each is loaded at its first
    request (a single one at once). On this machine no key is needed until `bise keys create` made the first.
    """
    from bise.assistant.examples import checked_examples
    from bise.engine.fleet import Fleet
    from bise.server.access import Access
    from bise.store.opening import Store

    checked_examples(values["examples"])
    if values["no_key"] and values["require_key"]:
        raise click.UsageError("--no-key and --require-key exclude each other")
    configure(values["log_level"])
    access = Access.OPEN if values["no_key"] else Access.REQUIRED if values["require_key"] else Access.AUTO
    specs = _specs(models or (None,), values)
    hosted = _hosted(values["remotes"], specs)
    memory = _memory(specs[0].placement, values["memory"])
    with (
        Store.open(values["db"]) as store,
        _listener(values, access, store) as listener,
        Fleet(specs, memory, values["idle"]) as fleet,
    ):
        if len(specs) == 1:
            fleet.wake(specs[0].name)
        for card in fleet.cards():
            if card.fault is not None:
                aside(f"note: {card.spec.name} cannot be served: {card.fault}")
            for adapter in card.adapters:
                if adapter.fault is not None:
                    aside(f"note: {card.spec.name}:{adapter.spec.name} cannot be served: {adapter.fault}")
        _serve(fleet, store, listener, access, values, hosted)


def _memory(placement: Placement, size: int | None) -> int | None:
    """Return the bytes for all models together; None: what is free on this machine."""
    from bise.engine.device import free_bytes

    if size is not None:
        return size
    return None if placement.is_native else free_bytes(placement)


def _hosted(names: tuple[str, ...], specs: list[ModelSpec]) -> HostedModels:
    """Return the hosted models to serve, their keys read; refuses one that is called like a local one."""
    from bise.hub.remotes import choose_remotes
    from bise.server.hosted import HostedModels

    taken = {name for spec in specs for name in (spec.name, *spec.aliases)} & set(names)
    if taken:
        raise click.UsageError(f"--remote {min(taken)}: a local model has that name")
    remotes = choose_remotes(names)
    for remote in remotes:
        aside(f"note: prompts to {remote.spec.name} leave this machine for {remote.spec.url}")
    return HostedModels(remotes)


def _listener(values: dict[str, Any], access: Access, store: Store) -> socket.socket:
    """Return the listening socket; refuses a public address that no key protects."""
    from bise.server.access import check_bind
    from bise.server.serving import bind

    check_bind(values["host"], access, bool(store.keys.list()))
    return bind(values["host"], values["port"])


def _serve(
    fleet: Fleet,
    store: Store,
    listener: socket.socket,
    access: Access,
    values: dict[str, Any],
    hosted: HostedModels,
) -> None:
    """Serve until told to stop."""
    import asyncio

    from bise.assistant.accounts import Accounts
    from bise.assistant.models import FleetModels
    from bise.server.access import Access, is_loopback
    from bise.server.app import create_app
    from bise.server.assistant_app import assistant_routers
    from bise.server.background import serve_all
    from bise.server.edge import Reach
    from bise.server.entry import StorePeople
    from bise.server.gate import StoreGate
    from bise.server.hosted_answers import HostedAnswers
    from bise.server.limits import HttpLimits
    from bise.server.metered_models import MeteredModels
    from bise.server.serving import Serving, prepare_process, release_process, url_of
    from bise.server.stored import routers

    limits = HttpLimits()
    reach = Reach(
        hosts=frozenset(name.lower() for name in (*values["hosts"], values["host"])),
        origins=frozenset(values["origins"]),
    )
    gate = StoreGate(
        store,
        access=access,
        is_local_only=is_loopback(values["host"]),
        canonical=lambda name: fleet.card(name).spec.name,
    )
    people = StorePeople(gate, Accounts(store.database))
    models = MeteredModels(FleetModels(fleet), gate, HostedAnswers(hosted))
    pages = assistant_routers(store.database, people, models, values["examples"])
    app = create_app(fleet, gate, limits=limits, reach=reach, routers=[*routers(), *pages], hosted=hosted)
    models.service = app.service
    page = f"{url_of(listener)}/"
    if store.keys.any_exist() and access is Access.AUTO:
        page += f"enter?pass={gate.local_pass}"

    def ready() -> None:
        click.echo(f"bise serves {', '.join(fleet.names())} at {url_of(listener)}/v1")
        click.echo(f"the assistant is at {page}")
        if values["open_page"]:
            click.launch(page)
        sys.stdout.flush()

    serving = Serving(app, limits=limits, grace_s=values["grace"], on_ready=ready)
    prepare_process()
    try:
        asyncio.run(serve_all(serving, app, gate, listener))
    finally:
        app.service.close()
        release_process()


def _specs(models: tuple[str | None, ...], values: dict[str, Any]) -> list[ModelSpec]:
    """Return what the fleet is to serve, in the order of the command line."""
    from bise.engine.device import require_device
    from bise.engine.model_spec import ModelSpec
    from bise.hub.registry import resolve

    placement = pop_placement(dict(values))
    require_device(placement)
    aliases: dict[str, list[str]] = {}
    for entry in values["aliases"]:
        alias, sign, model = entry.partition("=")
        if not sign or not alias or not model:
            raise click.UsageError(f"--alias needs ALIAS=MODEL, got '{entry}'")
        aliases.setdefault(model, []).append(alias)
    adapters, drafts = _adapters(values["adapters"]), _drafts(values["drafts"])
    prefixes = None if values["prefix_cache"] is None else _writable(values["prefix_cache"])
    specs: list[ModelSpec] = []
    for model in models:
        path = resolve(model)
        name = path.stem if path.suffix == ".gguf" else path.resolve().name
        known = {name, model or name}
        own = sorted(known if specs else known | {""})
        specs.append(
            ModelSpec(
                name=name,
                path=path,
                quant=values["quant"],
                kv=values["kv"],
                context=values["context"],
                sequences=values["sequences"],
                threads=values["threads"],
                placement=placement,
                prefix_cache_dir=prefixes,
                swap_bytes=values["swap"] or 0,
                aliases=tuple(alias for key in sorted(known) for alias in aliases.pop(key, ())),
                adapters=tuple(adapter for key in own for adapter in adapters.pop(key, ())),
                draft=_single([draft for key in own for draft in drafts.pop(key, ())], name),
            )
        )
    for option, left in (("alias", aliases), ("adapter", adapters), ("draft", drafts)):
        if left:
            raise click.UsageError(f"--{option} names a model that is not served: {', '.join(sorted(left))}")
    return specs


def _writable(name: str) -> Path:
    """Return the directory of --prefix-cache, made if need be; refuses one in which nothing can be kept now
    rather than when the server ends.
    """
    import os

    from bise.config import user_path

    path = user_path(name)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = None if os.access(path, os.R_OK | os.W_OK | os.X_OK) else "it is not yours to write to"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise click.UsageError(f"--prefix-cache {name}: {reason}; name a directory that you may write to")
    return path


def _adapters(entries: tuple[str, ...]) -> dict[str, list[AdapterSpec]]:
    """Return adapters by the model they are for; "" for the first one."""
    from bise.config import user_path
    from bise.engine.model_spec import AdapterSpec

    found: dict[str, list[AdapterSpec]] = {}
    for entry in entries:
        names, sign, directory = entry.partition("=")
        model, _, name = names.rpartition(":")
        if not sign or not name or not directory:
            raise click.UsageError(f"--adapter needs [MODEL:]NAME=DIR, got '{entry}'")
        found.setdefault(model, []).append(AdapterSpec(name=name, path=user_path(directory)))
    return found


def _drafts(entries: tuple[str, ...]) -> dict[str, list[Path]]:
    """Return draft models by the model they guess for; "" for the first one."""
    from bise.hub.registry import resolve

    found: dict[str, list[Path]] = {}
    for entry in entries:
        model, sign, draft = entry.partition("=")
        if not sign:
            model, draft = "", entry
        if not draft or (sign and not model):
            raise click.UsageError(f"--draft needs [MODEL=]DRAFT, got '{entry}'")
        found.setdefault(model, []).append(resolve(draft))
    return found


def _single(drafts: list[Path], name: str) -> Path | None:
    """Return the draft model of a model, None where there is none; refuses a second one."""
    if len(drafts) > 1:
        raise click.UsageError(f"--draft: {name} can have one draft model, got {len(drafts)}")
    return drafts[0] if drafts else None
