"""`bise accounts`: what people who sign in to the assistant may use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bise.cli.keys import change_options, changes_of, database_option, shown_limits
from bise.cli.options import text
from bise.cli.output import aside, write_json, write_table

if TYPE_CHECKING:
    from bise.store.allowances import AccountLimits


@click.group("accounts")
def command() -> None:
    """Show and limit the people who sign in to the assistant.

    Accounts are made in the page, the first one by whoever runs the server.
    """


@command.command("list")
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(db: str | None, as_json: bool) -> None:
    """List the accounts and what each may use."""
    from bise.store.opening import Store

    with Store.open(db) as store:
        accounts = store.allowances.list()
        everyone = store.allowances.everyone()
    if as_json:
        write_json([account.as_json() for account in (everyone, *accounts)], indent=2)
        return
    write_table(
        ["NAME", "ROLE", "STATE", "LIMITS", "RULES"], [_row(entry) for entry in (everyone, *accounts)]
    )
    if not accounts:
        aside("there are no accounts; the first one is made in the page")


@command.command("limit")
@click.argument("account", type=text, metavar="NAME_OR_ID")
@change_options
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def limit(account: str, db: str | None, as_json: bool, **values: Any) -> None:
    """Change what an account may use; '*' stands for all that have no limits of their own."""
    from bise.store.opening import Store

    changes, rules = changes_of(values)
    with Store.open(db) as store:
        changed = store.allowances.change(account, changes, rules)
    if as_json:
        write_json(changed.as_json())
        return
    click.echo(f"{changed.name}: {shown_limits(changed.limits)}")


def _row(account: AccountLimits) -> list[str]:
    own = "" if account.is_own or account.name == "*" else " (everyone's)"
    limits = shown_limits(account.limits)
    return [
        account.name,
        account.role or "-",
        "disabled" if account.is_disabled else "active",
        limits if limits == "-" else limits + own,
        " ".join(rule.name for rule in account.rules) or "-",
    ]
