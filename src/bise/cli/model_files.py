"""`bise models pull | rm | verify`: fetch, remove and check models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from bise.cli.options import text
from bise.cli.output import ProgressBar, aside, on_terminal
from bise.errors import UserError

if TYPE_CHECKING:
    from bise.hub.client import Listing


@click.command("pull")
@click.argument("model", type=text, metavar="NAME[@REVISION]")
@click.option("--hub", type=text, help="Address of the hub, such as https://HOST.")
@click.option("--token-env", type=text, metavar="VARIABLE", help="Environment variable with the hub's token.")
@click.option("--name", type=text, help="What to call it here.  [default: its alias, or its name]")
@click.option("--accept-licence", is_flag=True, help="Take the model's licence without being asked.")
def pull(model: str, hub: str | None, token_env: str | None, name: str | None, accept_licence: bool) -> None:
    """Fetch a model from a hub: an alias or OWNER/NAME, at a branch, tag or commit.

    Only safetensors, tokenizer, configuration and licence are fetched. It is here when all of it arrived and
    is as the hub listed it; a pull that was stopped goes on when it is asked for again.
    """
    from bise.config import secret_from
    from bise.hub.client import HubClient
    from bise.hub.file_names import is_repo, is_revision
    from bise.hub.pull import pull as fetch
    from bise.hub.registry import gigabytes, known_models, local_name

    wanted, sign, revision = model.partition("@")
    repo = {known.alias: known.repo for known in known_models()}.get(wanted, wanted)
    if not is_repo(repo) or (sign and not is_revision(revision)):
        raise UserError(
            f"'{model}' is no alias and no OWNER/NAME[@REVISION]; `bise models` lists the aliases"
        )
    if hub is None:
        raise UserError("no hub is configured: give --hub https://HOST or set BISE_MODELS_PULL_HUB")
    token = None if token_env is None else secret_from(token_env)

    def accept(listing: Listing, size: int) -> None:
        licence = listing.licence or "not stated"
        aside(f"{listing.repo} at {listing.commit[:12]}: {gigabytes(size)}, licence: {licence}")
        if accept_licence:
            return
        if not (on_terminal(sys.stdin) and on_terminal(sys.stderr)):
            raise UserError(f"the licence ({licence}) must be taken first: add --accept-licence")
        if not click.confirm("Do you take this licence?", default=False, err=True):
            raise UserError("the licence was not taken; nothing was fetched")

    with HubClient(hub, token) as client, ProgressBar() as bar:
        pulled = fetch(
            client, repo, revision or "main", name or local_name(repo), accept=accept, progress=bar
        )
    if not pulled.fetched:
        aside(f"{repo} at {pulled.commit[:12]} is here already")
    click.echo(pulled.path)


@click.command("rm")
@click.argument("name", type=text)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Remove a model from this machine, or a hosted one from the list."""
    from bise.hub.installed import find_installed, remove
    from bise.hub.remotes import forget_remote, load_remotes

    if name in load_remotes():
        forget_remote(name)
        return
    if not yes:
        target = find_installed(name)
        if not (on_terminal(sys.stdin) and on_terminal(sys.stderr)):
            raise UserError(f"removing {target} must be confirmed: add --yes")
        click.confirm(f"Remove {target}?", abort=True, err=True)
    remove(name)


@click.command("verify")
@click.argument("names", nargs=-1, type=text, metavar="[NAME]...")
def verify(names: tuple[str, ...]) -> None:
    """Compare models with the hashes that they came with; all of them without NAME."""
    from bise.hub.embedded import NAME
    from bise.hub.installed import verify as check
    from bise.hub.registry import local_models, origin_of

    damaged = 0
    for name in names or (NAME, *(path.name for path in local_models() if origin_of(path))):
        with ProgressBar() as bar:
            files = check(name, bar)
        click.echo(f"{name}: {'damaged: ' + ', '.join(files) if files else 'whole'}")
        damaged += bool(files)
    if damaged:
        raise UserError("remove what is damaged (`bise models rm NAME`) and pull it again")
