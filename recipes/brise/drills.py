"""Generated exercises of the last stage: copying what the user wrote, and small sums.

Why: after ten million tokens the model talked well, but got 7 + 5 wrong and defined another word than the
one asked for; it did not copy. With drills whose learned tokens are copies, sums came right within two
million tokens; definitions still name a wrong word. Owns the templates; held-back prompts are left out.
"""

import random
import re
from collections.abc import Iterable, Iterator

from mixture import Message, Row

ECHOES = (
    'Say "{x}".',
    "Repeat: {x}",
    "Repeat after me: {x}",
    'Please repeat "{x}".',
    'Write "{x}" again.',
    "Say {x}",
)
SUMS = (
    "{a}{o}{b}",
    "{a} {o} {b}",
    "{a} {o} {b} =",
    "{a}{o}{b}=",
    "What is {a}{o}{b}?",
    "What is {a} {o} {b}?",
    "what is {a} {o} {b}",
    "What's {a} {o} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "How much is {a} {o} {b}?",
    "Calculate {a} {o} {b}.",
    "Can you tell me what {a} {o} {b} is?",
)
WORDS = {"+": "plus", "-": "minus", "x": "times"}


def vocabulary(rows: Iterable[Row]) -> list[str]:
    """Return the lower-case words of 3 to 10 letters in `rows`, sorted."""
    text = " ".join(message["content"] for row in rows for message in row.get("messages", []))
    return sorted({word for word in re.findall(r"\b[a-z]+\b", text) if 3 <= len(word) <= 10})


def echoes(words: list[str], count: int, chance: random.Random) -> Iterator[Row]:
    """Yield `count` exercises in copying one to five words; one in four asks for a capital letter."""
    for _ in range(count):
        word = chance.choice(words)
        if chance.random() < 0.25:
            yield _row(f'Write the word "{word}" with a capital letter.', f"{word.capitalize()}.")
            continue
        said = " ".join([word, *chance.choices(words, k=chance.choice((0, 0, 1, 2, 3, 4)))])
        yield _row(chance.choice(ECHOES).format(x=said), said)


def sums(count: int, chance: random.Random, left_out: frozenset[str]) -> Iterator[Row]:
    """Yield up to `count` sums, mostly of numbers to 12; prompts in `left_out` (lower case) are skipped."""
    for _ in range(count):
        largest = chance.choice((9, 12, 12, 12, 20, 20, 99))
        operator = chance.choice("+++++--x")
        if operator == "x":
            largest = min(largest, 10)
        a, b = chance.randint(0, largest), chance.randint(0, largest)
        if operator == "-":
            a, b = max(a, b), min(a, b)
        result = {"+": a + b, "-": a - b, "x": a * b}[operator]
        prompt = chance.choice(SUMS).format(a=a, b=b, o=operator, word=WORDS[operator])
        if prompt.lower() in left_out:
            continue
        answers = (f"{a} {operator} {b} = {result}.", f"{a} {WORDS[operator]} {b} is {result}.")
        yield _row(prompt, chance.choice(answers))


def _row(prompt: str, answer: str) -> Row:
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
