"""`bise usage`: who used what, from the ledger."""

from __future__ import annotations

import csv
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from bise.cli.keys import database_option
from bise.cli.options import text
from bise.cli.output import aside, write_json, write_table
from bise.errors import UserError

if TYPE_CHECKING:
    from bise.store.ledger import UsageSum


@click.command("usage")
@click.option(
    "--by",
    type=click.Choice(["key", "model", "adapter", "day", "endpoint"]),
    default="key",
    show_default=True,
    help="What to sum up by.",
)
@click.option("--owner", type=text, help="Only this owner's requests.")
@click.option("--since", type=text, help="From this day on (2026-11-01, UTC).")
@click.option("--until", type=text, help="Up to this day, not included.")
@database_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    by: str,
    owner: str | None,
    since: str | None,
    until: str | None,
    db: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Tell who used what: requests, tokens, time, energy and cost."""
    from bise.store.opening import Store

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    first, last = _moment("--since", since), _moment("--until", until)
    with Store.open(db) as store:
        groups = store.ledger.sums(by, owner=owner, since=first, until=last)
        (total,) = store.ledger.sums(None, owner=owner, since=first, until=last)
        currency = store.prices.rates().currency
    if as_json:
        data = [group.as_json() for group in groups]
        write_json({"by": by, "currency": currency, "data": data, "total": total.as_json()}, indent=2)
    elif as_csv:
        fields = list(total.as_json())
        writer = csv.DictWriter(sys.stdout, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**group.as_json(), "name": _inert(group.name)} for group in groups)
    elif not groups:
        aside("the ledger is empty for that")
    else:
        _write(by, groups, total, currency)


def _write(by: str, groups: list[UsageSum], total: UsageSum, currency: str) -> None:
    columns = [
        by.upper(),
        "REQUESTS",
        "ERRORS",
        "PROMPT",
        "CACHED",
        "OUTPUT",
        "COMPUTE s",
        "kJ",
        currency,
        "HOUSE",
    ]
    rows = [_row(group.name or "-", group) for group in groups]
    write_table(columns, [*rows, _row("total", total)])
    if total.unpriced:
        aside(f"{total.unpriced} requests ran on models without a price; `bise prices set` gives them one")


def _row(name: str, group: UsageSum) -> list[str]:
    return [
        name,
        str(group.requests),
        str(group.errors),
        str(group.prompt_tokens),
        str(group.cached_tokens),
        str(group.completion_tokens),
        f"{group.prefill_s + group.decode_s:.1f}",
        "-" if group.energy_j is None else f"{group.energy_j / 1000:.3f}",
        f"{group.cost:.6f}",
        "-" if group.house_cost is None else f"{group.house_cost:.6f}",
    ]


def _inert(name: str) -> str:
    """Return a name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name


def _moment(option: str, day: str | None) -> float | None:
    if day is None:
        return None
    try:
        return datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise UserError(f"{option} must be a day such as 2026-11-21, got {day!r}", field=option) from error
