"""Generated exercises of the last stage: copying what the user wrote, small sums, and common words.

Why: after ten million tokens the model talked well, but got 7 + 5 wrong and defined another word than the
one asked for; it did not copy. With drills whose learned tokens are copies, sums came right within two
million tokens. Six thousand meanings, seen a few times each, stayed a blur; so the commonest words of
children's texts come again and again, each with one short meaning. Owns the templates; held-back prompts
are left out.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import sqrt

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
MEANINGS = (
    "Define {w}.",
    'Define "{w}".',
    "What does {w} mean?",
    'What does "{w}" mean?',
    'What does the word "{w}" mean?',
    'What is the meaning of the word "{w}"?',
    'Explain the word "{w}".',
    "Define the word {w}.",
)
THINGS = ("What is {a} {w}?", "What's {a} {w}?", "Tell me what {a} {w} is.")
MEANING = re.compile(r"(?P<word>[A-Z][a-z]+) is an? (?P<kind>\w+) that means: (?P<meaning>[^;.]+[^;. ])")
"""The first sense of an entry of chat/wordnet, up to its first semicolon or full stop."""
ASIDE = re.compile(r" ?\([^()]*\)")
LONGEST_MEANING = 130
"""Characters; a longer meaning is too much to learn by heart."""


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


def meanings(rows: Iterable[Row], counts: Counter[str], num_words: int) -> dict[str, tuple[str, str]]:
    """Return (part of speech, meaning) of the `num_words` words that are commonest by `counts`.

    Example row: "Cat is a noun that means: feline mammal usually having thick soft fur and no ability to
    roar." Words without a short meaning in `rows` are passed over.
    """
    found: dict[str, tuple[str, str]] = {}
    for row in rows:
        match = MEANING.match(row.get("messages", [])[-1]["content"])
        meaning = ASIDE.sub("", match["meaning"]).strip() if match else ""
        if match and meaning and len(meaning) <= LONGEST_MEANING and not set("()") & set(meaning):
            found[match["word"].lower()] = (match["kind"], meaning)
    commonest = sorted(found, key=lambda word: (-counts[word], word))[:num_words]
    return {word: found[word] for word in commonest}


def definitions(
    known: dict[str, tuple[str, str]], counts: Counter[str], count: int, chance: random.Random
) -> Iterator[Row]:
    """Yield `count` questions for the meaning of a word, common ones more often (by the root of `counts`)."""
    weights = [sqrt(sqrt(1 + counts[word])) for word in known]
    for word in chance.choices(list(known), weights, k=count):
        kind, meaning = known[word]
        article = "an" if word[0] in "aeiou" else "a"
        if kind == "noun" and chance.random() < 0.25:
            prompt = chance.choice(THINGS).format(a=article, w=word)
        else:
            prompt = chance.choice(MEANINGS).format(w=word)
        if chance.random() < 0.3:  # as people type
            prompt = prompt.lower().rstrip("?.")
        yield _row(prompt, definition(word, kind, meaning))


def definition(word: str, kind: str, meaning: str) -> str:
    """Return the answer to a question for a meaning, worded as in chat/wordnet."""
    return f"{word.capitalize()} is {'an' if kind[0] in 'aeiou' else 'a'} {kind} that means: {meaning}."


def _row(prompt: str, answer: str) -> Row:
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
