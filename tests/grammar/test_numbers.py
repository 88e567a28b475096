"""Ranges of numbers as expressions: exactly the integers and decimals inside of the bounds."""

import random
import re
from decimal import Decimal

from bise.grammar.numbers import integers_between, numbers_between
from bise.grammar.regex import spelled


def compiled(node) -> re.Pattern[str]:
    return re.compile(
        re.sub(r"\\x\{([0-9A-F]+)\}", lambda match: f"\\x{int(match[1], 16):02x}", spelled(node))
    )


def test_integers_between_are_exactly_those():
    rng = random.Random(1)
    for _ in range(150):
        low = rng.randrange(-(10 ** rng.randrange(1, 6)), 10 ** rng.randrange(1, 6))
        high = low + rng.randrange(10 ** rng.randrange(1, 6))
        pattern = compiled(integers_between(low, high))
        for value in (
            low,
            high,
            low - 1,
            high + 1,
            0,
            *(rng.randrange(low - 50, high + 50) for _ in range(8)),
        ):
            assert bool(pattern.fullmatch(str(value))) == (low <= value <= high), (low, high, value)


def test_decimals_between_are_exactly_those():
    rng = random.Random(2)
    for _ in range(150):
        low = Decimal(rng.randrange(-(10**5), 10**5)).scaleb(-rng.randrange(6))
        high = low + Decimal(rng.randrange(1, 10**5)).scaleb(-rng.randrange(6))
        above, below = rng.random() < 0.3, rng.random() < 0.3
        pattern = compiled(numbers_between(low, high, above=above, below=below))
        for value in (low, high, *(Decimal(rng.randrange(-(10**6), 10**6)).scaleb(-5) for _ in range(10))):
            inside = (value > low if above else value >= low) and (value < high if below else value <= high)
            text = (
                format(value.normalize(), "f").replace("-0", "0")
                if value == 0
                else format(value.normalize(), "f")
            )
            assert bool(pattern.fullmatch(text)) == inside, (low, high, above, below, text)
