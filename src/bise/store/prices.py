"""The price book: what a model's tokens cost, and what running this machine costs. Decimal, never float."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from bise.errors import ConfigError, NotFoundError
from bise.store.database import Database
from bise.store.schema import MONEY_UNIT, PriceRecord, SettingRecord

ANY_MODEL = "*"
"""The entry of all models without one of their own."""
_RATES = ("currency", "energy", "hardware", "hardware_years")
# Every request asks for these two; building a statement costs more than running it.
_PRICE = select(PriceRecord).where(
    or_(PriceRecord.model == bindparam("its_name"), PriceRecord.model == ANY_MODEL)
)
_SETTINGS = select(SettingRecord.name, SettingRecord.value).where(SettingRecord.name.in_(_RATES))
MAX_PRICE = Decimal(1_000_000)
PRICE_DECIMALS = 6
MILLION = Decimal(1_000_000)
JOULES_PER_KWH = Decimal(3_600_000)
SECONDS_PER_YEAR = Decimal(365 * 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Prices of one model per million tokens. Raises ConfigError, naming the field."""

    model: str
    """The served model's name, or `*` for all others."""
    input: Decimal
    """Prompt tokens that were computed."""
    cached: Decimal
    """Prompt tokens found in the prefix cache."""
    output: Decimal

    def __post_init__(self) -> None:
        if not self.model.isprintable() or not 0 < len(self.model) <= 300:
            raise ConfigError("model must have 1 to 300 printable characters", field="model")
        for name, value in (("input", self.input), ("cached", self.cached), ("output", self.output)):
            _check(name, value, MAX_PRICE, PRICE_DECIMALS)

    def of(self, prompt: int, cached: int, completion: int) -> Decimal:
        """Return the exact price of a request; `cached` tokens are part of `prompt`."""
        return (self.input * (prompt - cached) + self.cached * cached + self.output * completion) / MILLION

    def as_json(self) -> dict[str, str]:
        """Return the entry with amounts as strings."""
        return {
            "model": self.model,
            "input": _plain(self.input),
            "cached": _plain(self.cached),
            "output": _plain(self.output),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HouseRates:
    """What running this machine costs. Raises ConfigError, naming the field."""

    currency: str = "EUR"
    """Three letters; every amount in the database is in it."""
    energy: Decimal | None = None
    """Per kilowatt hour."""
    hardware: Decimal | None = None
    """Purchase price of the machine."""
    hardware_years: Decimal = Decimal(4)
    """Years over which the purchase is written off."""

    def __post_init__(self) -> None:
        if len(self.currency) != 3 or not (self.currency.isascii() and self.currency.isupper()):
            raise ConfigError(
                f"currency must be three capital letters, got {self.currency!r}", field="currency"
            )
        for name, value in (("energy", self.energy), ("hardware", self.hardware)):
            if value is not None:
                _check(name, value, Decimal(10_000_000), PRICE_DECIMALS)
        if not (self.hardware_years.is_finite() and Decimal("0.1") <= self.hardware_years <= 100):
            raise ConfigError(
                f"hardware_years must be from 0.1 to 100, got {self.hardware_years}", field="hardware_years"
            )

    def of(self, machine_s: float, energy_j: float | None) -> Decimal | None:
        """Return what a share of the machine's time and energy costs; None when no rate is known for it."""
        parts: list[Decimal] = []
        if self.energy is not None and energy_j is not None:
            parts.append(Decimal(energy_j) * self.energy / JOULES_PER_KWH)
        if self.hardware is not None:
            parts.append(Decimal(machine_s) * self.hardware / (self.hardware_years * SECONDS_PER_YEAR))
        return sum(parts, Decimal(0)).quantize(MONEY_UNIT) if parts else None

    def as_json(self) -> dict[str, str | None]:
        """Return the rates with amounts as strings."""
        return {
            "currency": self.currency,
            "energy": None if self.energy is None else _plain(self.energy),
            "hardware": None if self.hardware is None else _plain(self.hardware),
            "hardware_years": _plain(self.hardware_years),
        }


class PriceBook:
    """The prices of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(self, price: Price) -> None:
        """Enter a price or replace the model's old one; rows already in the ledger keep theirs."""
        with self._database.writing() as session:
            session.merge(
                PriceRecord(model=price.model, input=price.input, cached=price.cached, output=price.output)
            )

    def remove(self, model: str) -> None:
        """Strike a model from the book; NotFoundError when it is not in it."""
        with self._database.writing() as session:
            record = session.get(PriceRecord, model)
            if record is None:
                raise NotFoundError("the price book has no such model; `bise prices` lists it", field="model")
            session.delete(record)

    def list(self) -> list[Price]:
        """Return all prices by model."""
        query = select(PriceRecord).order_by(PriceRecord.model)
        with self._database.reading() as session:
            return [Price(**row) for row in session.connection().execute(query).mappings()]

    def get(self, model: str, session: Session | None = None) -> Price | None:
        """Return a model's price or the one for all others; None when the book has neither."""
        if session is None:
            with self._database.reading() as own:
                return self.get(model, own)
        found = session.connection().execute(_PRICE, {"its_name": model}).mappings()
        prices = {row["model"]: Price(**row) for row in found}
        return prices.get(model) or prices.get(ANY_MODEL)

    def rates(self, session: Session | None = None) -> HouseRates:
        """Return what running this machine costs; defaults until `set_rates` was called."""
        if session is None:
            with self._database.reading() as own:
                return self.rates(own)
        stored = {row.name: row.value for row in session.connection().execute(_SETTINGS)}
        amounts = {name: Decimal(stored[name]) for name in _RATES[1:] if name in stored}
        rates = replace(HouseRates(), **amounts)
        return replace(rates, currency=stored["currency"]) if "currency" in stored else rates

    def set_rates(self, rates: HouseRates) -> None:
        """Replace the rates."""
        with self._database.writing() as session:
            for name, value in rates.as_json().items():
                record = session.get(SettingRecord, name)
                if record is not None:
                    session.delete(record)
                    session.flush()
                if value is not None:
                    session.add(SettingRecord(name=name, value=value))


def _check(name: str, value: Decimal, limit: Decimal, decimals: int) -> None:
    if not (value.is_finite() and 0 <= value <= limit):
        raise ConfigError(f"{name} must be an amount from 0 to {limit}, got {value}", field=name)
    if value != value.quantize(Decimal(1).scaleb(-decimals)):
        raise ConfigError(f"{name} must have at most {decimals} decimals, got {value}", field=name)


def _plain(value: Decimal) -> str:
    """Return an amount without exponent and without idle zeros: `0.04`, `12`."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
