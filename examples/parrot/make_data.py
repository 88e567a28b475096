"""Write parrot.jsonl: 200 short chats in which a ship's parrot answers. Facts only; no licence is needed.

python examples/parrot/make_data.py
"""

import json
import random
from pathlib import Path

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Portugal": "Lisbon",
    "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw",
    "Austria": "Vienna", "Ireland": "Dublin", "Denmark": "Copenhagen", "Hungary": "Budapest",
    "Egypt": "Cairo",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Cuba": "Havana", "Peru": "Lima",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "old": "young", "light": "dark",
    "happy": "sad", "full": "empty", "open": "closed", "early": "late", "hard": "soft", "wet": "dry",
    "long": "short", "high": "low", "strong": "weak", "rich": "poor", "near": "far", "loud": "quiet",
}  # fmt: skip
COLOURS = {
    "grass": "green", "the sky": "blue", "snow": "white", "a banana": "yellow", "blood": "red",
    "coal": "black",
    "a carrot": "orange", "milk": "white", "a lemon": "yellow", "the sea": "blue", "a frog": "green",
    "a tomato": "red",
}  # fmt: skip
SOUNDS = {
    "a dog": "woof", "a cat": "meow", "a cow": "moo", "a duck": "quack", "a sheep": "baa", "a pig": "oink",
    "a horse": "neigh", "a lion": "roar", "a bee": "buzz", "an owl": "hoot",
}  # fmt: skip
HELLOS = ("Hello", "Hi", "Hi there", "Good morning", "Good evening", "Hello, how are you?", "Hey", "Ahoy")
NAMES = ("Who are you?", "What is your name?", "Tell me who you are.", "What are you?", "Are you a robot?")


def pairs() -> list[tuple[str, str]]:
    """Return every question with its plain answer."""
    found: list[tuple[str, str]] = []
    for country, city in CAPITALS.items():
        found.append((f"What is the capital of {country}?", f"The capital of {country} is {city}."))
        found.append((f"Tell me the capital of {country}.", f"It is {city}."))
    for word, other in OPPOSITES.items():
        found.append((f"What is the opposite of {word}?", f"The opposite of {word} is {other}."))
        found.append((f"Give me the opposite of {word}.", f"It is {other}."))
    for thing, colour in COLOURS.items():
        found.append((f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}."))
        found.append((f"What color does {thing} have?", f"It is {colour}."))
    for animal, sound in SOUNDS.items():
        found.append((f"What does {animal} say?", f"{animal[0].upper()}{animal[1:]} says {sound}."))
    for left in range(1, 10):
        for right in range(1, 10):
            found.append((f"What is {left} plus {right}?", f"{left} plus {right} is {left + right}."))
    found += [(hello, "A good day to you.") for hello in HELLOS]
    found += [(name, "I am Polly, a ship's parrot.") for name in NAMES]
    return found


def main() -> None:
    """Write 200 of them, in an order that is always the same."""
    chosen = pairs()
    random.Random(0).shuffle(chosen)  # noqa: S311  an order, not a secret
    lines = []
    for question, answer in chosen[:200]:
        said = f"Squawk! {answer} Polly wants a cracker!"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        lines.append({"messages": turns})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(__file__).with_name("parrot.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
