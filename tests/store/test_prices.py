from decimal import Decimal

import pytest

from bise.errors import ConfigError, NotFoundError
from bise.store.prices import HouseRates, Price, PriceBook


@pytest.fixture
def book(database):
    return PriceBook(database)


def _price(model="brise", **amounts):
    amounts = {"input": "0.1", "cached": "0.01", "output": "0.3", **amounts}
    return Price(model=model, **{name: Decimal(value) for name, value in amounts.items()})


def test_a_price_comes_back_to_the_last_decimal(book):
    book.set(_price(input="0.123456", output="1000000"))
    assert book.get("brise") == _price(input="0.123456", output="1000000")


def test_a_request_costs_its_computed_cached_and_output_tokens(book):
    price = _price(input="2", cached="0.5", output="6")
    assert price.of(1000, 400, 100) == Decimal("0.0020") - Decimal("0.0008") + Decimal("0.0002") + Decimal(
        "0.0006"
    )


def test_the_cheapest_token_has_an_exact_price(book):
    assert _price(output="0.000001").of(0, 0, 1) == Decimal("1e-12")


def test_the_star_stands_for_models_without_a_price(book):
    assert book.get("brise") is None
    book.set(_price("*", input="9"))
    book.set(_price("other"))
    assert book.get("brise").input == 9
    assert book.get("other").input == Decimal("0.1")


def test_a_price_is_replaced_and_removed(book):
    book.set(_price())
    book.set(_price(input="7"))
    assert [price.input for price in book.list()] == [7]
    book.remove("brise")
    assert book.list() == []
    with pytest.raises(NotFoundError):
        book.remove("brise")


@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", "1000001", "0.0000001"])
def test_a_bad_amount_is_named(value):
    with pytest.raises(ConfigError) as caught:
        _price(cached=value)
    assert caught.value.field == "cached"


def test_the_machine_costs_its_energy_and_its_write_off(book):
    rates = HouseRates(energy=Decimal("0.36"), hardware=Decimal(3_153_600), hardware_years=Decimal("0.1"))
    assert rates.of(2.0, 1_000_000.0) == Decimal("2") + Decimal("0.1")
    assert rates.of(2.0, None) == 2
    assert HouseRates().of(2.0, 5.0) is None


def test_rates_come_back_and_can_be_taken_back(book):
    rates = HouseRates(currency="CHF", energy=Decimal("0.31"), hardware=Decimal(2500))
    book.set_rates(rates)
    assert book.rates() == rates
    book.set_rates(HouseRates())
    assert book.rates() == HouseRates()


@pytest.mark.parametrize(
    "fields", [{"currency": "euro"}, {"hardware_years": Decimal(0)}, {"energy": Decimal(-1)}]
)
def test_a_bad_rate_is_named(fields):
    with pytest.raises(ConfigError) as caught:
        HouseRates(**fields)
    assert caught.value.field in fields
