"""`bise prices`: the price book and what this machine costs."""

from __future__ import annotations

import click

from bise.cli.keys import database_option
from bise.cli.options import text
from bise.cli.output import aside, write_json, write_table


@click.group("prices", invoke_without_command=True)
@database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, db: str | None, as_json: bool) -> None:
    """Show or change the price book.

    Prices are per million tokens; the model * stands for all without a price of their own.
    """
    context.obj = db
    if context.invoked_subcommand is not None:
        return
    from bise.store.opening import Store

    with Store.open(db) as store:
        prices, rates = store.prices.list(), store.prices.rates()
    if as_json:
        write_json({"rates": rates.as_json(), "prices": [price.as_json() for price in prices]}, indent=2)
        return
    if prices:
        rows = [
            [p["model"], p["input"], p["cached"], p["output"]] for p in (price.as_json() for price in prices)
        ]
        write_table(["MODEL", f"INPUT {rates.currency}/M", "CACHED", "OUTPUT"], rows)
    else:
        aside("the price book is empty; `bise prices set MODEL --input 0.10 --output 0.30` makes an entry")
    known = rates.as_json()
    energy = f"{known['energy']} {rates.currency}/kWh" if known["energy"] else "not set"
    hardware = (
        f"{known['hardware']} {rates.currency} over {known['hardware_years']} years"
        if known["hardware"]
        else "not set"
    )
    aside(f"energy: {energy}; hardware: {hardware} (`bise prices house`)")


@command.command("set")
@click.argument("model", type=text)
@click.option("--input", "input_", required=True, type=text, help="Per million prompt tokens.")
@click.option(
    "--cached", type=text, help="Per million prompt tokens found in the cache.  [default: as --input]"
)
@click.option("--output", required=True, type=text, help="Per million output tokens.")
@click.pass_obj
def set_(db: str | None, model: str, input_: str, cached: str | None, output: str) -> None:
    """Enter MODEL's price or replace it; requests already in the ledger keep theirs."""
    from bise.store.keys import amount
    from bise.store.opening import Store
    from bise.store.prices import Price

    price = Price(
        model=model,
        input=amount("--input", input_),
        cached=amount("--cached", input_ if cached is None else cached),
        output=amount("--output", output),
    )
    with Store.open(db) as store:
        store.prices.set(price)


@command.command("remove")
@click.argument("model", type=text)
@click.pass_obj
def remove(db: str | None, model: str) -> None:
    """Strike MODEL from the price book."""
    from bise.store.opening import Store

    with Store.open(db) as store:
        store.prices.remove(model)


@command.command("house")
@click.option("--currency", default="EUR", show_default=True, type=text, help="Of every amount.")
@click.option("--energy", type=text, help="Per kilowatt hour.")
@click.option("--hardware", type=text, help="Purchase price of this machine.")
@click.option(
    "--hardware-years", default="4", show_default=True, type=text, help="Years it is written off over."
)
@click.pass_obj
def house(
    db: str | None, currency: str, energy: str | None, hardware: str | None, hardware_years: str
) -> None:
    """Set what running this machine costs; what is left out is taken back."""
    from bise.store.keys import amount
    from bise.store.opening import Store
    from bise.store.prices import HouseRates

    rates = HouseRates(
        currency=currency,
        energy=None if energy is None else amount("--energy", energy),
        hardware=None if hardware is None else amount("--hardware", hardware),
        hardware_years=amount("--hardware-years", hardware_years),
    )
    with Store.open(db) as store:
        store.prices.set_rates(rates)
