"""`bise keys`: make, list and revoke API keys."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bise.cli.options import text
from bise.cli.output import aside, write_json, write_table
from bise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bise.store.keys import KeyInfo, KeyLimits
    from bise.store.rules import Rule

DAY_S = 86_400
database_option = click.option(
    "--db", type=text, help="Database: a path or postgresql://...  [default: bise.db under BISE_HOME]"
)


LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "money_per_month", "concurrency")


def limit_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of limits to a command."""
    for option in (
        click.option("--concurrency", type=int, help="Requests at the same time."),
        click.option("--money-per-month", type=text, help="At the price book's prices, such as 12.50."),
        click.option("--tokens-per-day", type=int, help="Tokens from midnight to midnight, UTC."),
        click.option("--tokens-per-minute", type=int, help="Tokens in any 60 seconds."),
        click.option("--requests-per-minute", type=int, help="Requests in any 60 seconds."),
    ):
        function = option(function)
    return function


def change_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that change limits and guardrails to a command."""
    names = [name.replace("_", "-") for name in (*LIMITS, "priority")]
    function = rules_option(function)
    function = click.option(
        "--lift",
        "lifted",
        multiple=True,
        type=click.Choice(names),
        help="A limit to remove; may be repeated.",
    )(function)
    function = click.option("--priority", type=int, help="Lower runs first.")(function)
    return limit_options(function)


def changes_of(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...] | None]:
    """Return (limits to change, rules to set or None) of a command with `change_options`."""
    changes = {name: values[name] for name in (*LIMITS, "priority") if values[name] is not None}
    for name in values["lifted"]:
        if changes.setdefault(name.replace("-", "_")) is not None:
            raise click.UsageError(f"--lift {name} and --{name} exclude each other")
    rules = None if values["rules"] is None else read_rules(values["rules"])
    if not changes and rules is None:
        raise click.UsageError("nothing to change: give a limit, --lift or --rules")
    return changes, rules


rules_option = click.option(
    "--rules", type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file of guardrails: [[rules]] with name, pattern (RE2) and stage (input, output, both).",
)  # fmt: skip


@click.group("keys")
def command() -> None:
    """Make, list, limit and revoke API keys.

    Once a key was made, every request to `bise serve` needs one.
    """


@command.command("create")
@click.option("--name", required=True, type=text, help="What people call the key.")
@click.option("--owner", type=text, help="Whose files, jobs and usage it reaches.  [default: its own]")
@click.option(
    "--scope", "scopes", multiple=True, type=text,
    help="inference, tune, admin, metrics or model:NAME; may be repeated.  [default: inference]",
)  # fmt: skip
@limit_options
@click.option("--priority", type=int, default=0, show_default=True, help="Lower runs first.")
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="Days until it expires.")
@rules_option
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the field `key`.")
def create(as_json: bool, db: str | None, **values: Any) -> None:
    """Make a key and print it. It is shown this once and can never be shown again."""
    from bise.store.opening import Store

    days = values["expires_days"]
    with Store.open(db) as store:
        info, key = store.keys.create(
            values["name"],
            owner=values["owner"],
            scopes=values["scopes"] or ("inference",),
            limits=_limits(values),
            rules=() if values["rules"] is None else read_rules(values["rules"]),
            expires_at=None if days is None else time.time() + days * DAY_S,
        )
    if as_json:
        write_json({"key": key, **info.as_json()})
        return
    click.echo(key)
    aside(f"key {info.id} ({info.name}); it is not stored and cannot be shown again")


@command.command("list")
@click.option("--revoked", is_flag=True, help="Revoked keys, too.")
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(revoked: bool, db: str | None, as_json: bool) -> None:
    """List the keys; the keys themselves are nowhere stored."""
    from bise.store.opening import Store

    with Store.open(db) as store:
        keys = store.keys.list(with_revoked=revoked)
    if as_json:
        write_json([key.as_json() for key in keys], indent=2)
        return
    if not keys:
        aside("there are no keys; `bise keys create --name NAME` makes one")
        return
    columns = ["ID", "NAME", "OWNER", "SCOPES", "LIMITS", "MADE", "EXPIRES", "REVOKED"]
    write_table(columns, [_row(key) for key in keys])


@command.command("revoke")
@click.argument("key", type=text, metavar="ID_OR_NAME")
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def revoke(key: str, db: str | None, as_json: bool) -> None:
    """Revoke a key; running servers refuse it from their next request on."""
    from bise.store.opening import Store

    with Store.open(db) as store:
        info = store.keys.revoke(key)
    if as_json:
        write_json(info.as_json())
        return
    click.echo(f"revoked {info.id} ({info.name})")


@command.command("limit")
@click.argument("key", type=text, metavar="ID_OR_NAME")
@change_options
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def limit(key: str, db: str | None, as_json: bool, **values: Any) -> None:
    """Change what a key may use; running servers obey from its next request on."""
    from bise.store.opening import Store

    changes, rules = changes_of(values)
    with Store.open(db) as store:
        info = store.keys.change(key, changes, rules)
    if as_json:
        write_json(info.as_json())
        return
    click.echo(f"{info.id} ({info.name}): {shown_limits(info.limits)}")


def shown_limits(limits: KeyLimits) -> str:
    """Return limits on one line."""
    return " ".join(f"{name}={value}" for name, value in limits.as_json().items() if value != 0) or "-"


def _limits(values: dict[str, Any]) -> KeyLimits:
    from bise.store.keys import limits_from_json

    return limits_from_json({name: values[name] for name in (*LIMITS, "priority")})


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Return the guardrails in a TOML file. Raises ConfigError, naming the file."""
    import tomllib

    from bise.diskfile import read_bounded
    from bise.store.rules import rules_from_json

    try:
        document = tomllib.loads(read_bounded(path, 1 << 20).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", field=str(path)) from error
    if set(document) != {"rules"}:
        raise ConfigError(f"{path}: must hold [[rules]] and nothing else", field=str(path))
    return rules_from_json(document["rules"], f"{path}: rules")


def _row(key: KeyInfo) -> list[str]:
    return [
        key.id,
        key.name,
        "-" if key.owner == key.id else key.owner,
        " ".join(sorted(key.scopes)),
        shown_limits(key.limits),
        _day(key.created_at),
        _day(key.expires_at),
        _day(key.revoked_at),
    ]


def _day(moment: float | None) -> str:
    return "-" if moment is None else time.strftime("%Y-%m-%d", time.gmtime(moment))
