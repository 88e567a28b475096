"""Turn the training bundle into token arrays: seeded, the same bytes on every run.

    python recipes/brise/data.py --data DATA --run RUN

Writes `<name>.ids.npy` (uint16 rows [N, row_tokens + 1]) and `<name>.learned.npy` (bool) for pretrain, tune,
polish, valid_text and valid_chat. Row i trains on ids[:-1] to say ids[1:] where learned[1:]. Knows nothing of
the network.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from chat import PAD, ChatEncoder, Encoded
from drills import definitions, echoes, meanings, sums, vocabulary
from mixture import ARRAYS, SMALLTALK, Mixture, Row, read_rows, renamed, row_texts

COMMON_WORDS = ("text/storybooks.jsonl.zst", "cdla/tinystories_text.jsonl.zst", "text/fairytales.jsonl.zst")
"""Texts for children: how often a word stands there decides which meanings are drilled."""

WORDNET = "chat/wordnet.jsonl.zst"

OPEN_BINS = 96
"""Rows kept open while packing; more fills them better and costs time."""


def encode_row(
    row: Row, encoder: ChatEncoder, mixture: Mixture, source: str, chance: random.Random
) -> Encoded:
    """Return a text (learned whole) or a conversation, with a system prompt at the mixture's rate."""
    if "text" in row:
        ids = encoder.document(row["text"])
        return Encoded(ids, [False] + [True] * (len(ids) - 1))
    messages = row.get("messages", [])
    if source == SMALLTALK:
        messages = renamed(messages, mixture)
    system = chance.choice(mixture.system_prompts) if chance.random() < mixture.system_share else None
    return encoder.chat(messages, system)


def passes(rows: list[Row], share: float, chance: random.Random) -> Iterator[Row]:
    """Yield all rows int(share) times and a drawn part of them for the rest of the share."""
    for _ in range(int(share)):
        yield from rows
    yield from chance.sample(rows, round(len(rows) * (share % 1.0)))


def documents(mixture: Mixture, stage: str, data: Path, encoder: ChatEncoder) -> list[Encoded]:
    """Return all documents of a stage in their training order."""
    found: list[Encoded] = []
    for source in mixture.sources:
        share = source.share(stage)
        if share > 0:
            chance = random.Random(f"{mixture.seed}:{stage}:{source.path}")
            rows = list(read_rows(data / source.path))
            before = len(found)
            found += [
                encode_row(row, encoder, mixture, source.name, chance) for row in passes(rows, share, chance)
            ]
            tokens = sum(len(document) for document in found[before:])
            print(f"{stage}: {source.path} {len(found) - before} rows, {tokens} tokens", flush=True)
    if stage == "polish":
        chance = random.Random(f"{mixture.seed}:{stage}:drills")
        found += [encode_row(row, encoder, mixture, "drills", chance) for row in drill_rows(mixture, data)]
    random.Random(f"{mixture.seed}:{stage}:order").shuffle(found)
    return found


def drill_rows(mixture: Mixture, data: Path) -> list[Row]:
    """Return the generated exercises of the last stage; held-back prompts are not among them."""
    chance = random.Random(f"{mixture.seed}:drills")
    held = read_rows(data / "valid" / "chat.jsonl.zst")
    left_out = frozenset(text.lower() for row in held for text in row_texts(row))
    entries = list(read_rows(data / WORDNET))
    found = list(echoes(vocabulary(entries), mixture.drills["echoes"], chance))
    found += sums(mixture.drills["sums"], chance, left_out)
    counts = word_counts(data)
    known = meanings(entries, counts, mixture.drills["words"])
    return found + list(definitions(known, counts, mixture.drills["definitions"], chance))


def word_counts(data: Path) -> Counter[str]:
    """Return how often each lower-case word stands in the texts for children."""
    counts = Counter[str]()
    for path in COMMON_WORDS:
        for row in read_rows(data / path):
            counts.update(re.findall(r"[a-z]+", row["text"]) if "text" in row else ())
    return counts


def concatenate(
    found: Iterable[Encoded], row_tokens: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Lay documents end to end and cut rows of row_tokens + 1 that overlap by one; all is learned.

    Example: tokens 1 2 3 4 5 with row_tokens 2 give rows [1 2 3] and [3 4 5]; what is left over is dropped.
    """
    stream = np.fromiter((token for document in found for token in document.ids), np.uint16)
    count = (len(stream) - 1) // row_tokens
    starts = np.arange(count)[:, None] * row_tokens
    return stream[starts + np.arange(row_tokens + 1)], np.ones((count, row_tokens + 1), np.bool_)


def pack(found: Iterable[Encoded], row_tokens: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Put whole documents into rows of row_tokens + 1, best fit first; longer documents lose their end.

    Example: lengths 3, 4, 2 into rows of 5 + 1 give [4 + 2] and [3 and three pads].
    """
    size = row_tokens + 1
    closed: list[list[Encoded]] = []
    bins: list[tuple[int, list[Encoded]]] = []
    for document in found:
        length = min(len(document), size)
        fitting = [index for index, (used, _) in enumerate(bins) if used + length <= size]
        if fitting:
            best = max(fitting, key=lambda index: bins[index][0])
            used, members = bins[best]
            bins[best] = (used + length, [*members, document])
            continue
        if len(bins) >= OPEN_BINS:
            fullest = max(range(len(bins)), key=lambda index: bins[index][0])
            closed.append(bins.pop(fullest)[1])
        bins.append((length, [document]))
    closed += [members for _, members in bins]
    ids = np.full((len(closed), size), PAD, np.uint16)
    learned = np.zeros((len(closed), size), np.bool_)
    for row, members in enumerate(closed):
        start = 0
        for member in members:
            end = min(start + len(member), size)
            ids[row, start:end] = member.ids[: end - start]
            learned[row, start:end] = member.learned[: end - start]
            start = end
    return ids, learned


def write(run: Path, name: str, arrays: tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]) -> None:
    """Write the two arrays of a set and say how large it is."""
    ids, learned = arrays
    np.save(run / f"{name}.ids.npy", ids)
    np.save(run / f"{name}.learned.npy", learned)
    real = int((ids[:, 1:] != PAD).sum())
    print(f"{name}: {len(ids)} rows, {real} tokens, {int(learned[:, 1:].sum())} learned", flush=True)


def held_back(mixture: Mixture, data: Path, encoder: ChatEncoder, kind: str) -> tuple[list[Encoded], int]:
    """Return the held-back documents of a kind (text, chat) and the bytes of what is learned in them."""
    rows = list(read_rows(data / "valid" / f"{kind}.jsonl.zst"))
    never = random.Random(0)
    plain = [encode_row(row, encoder, mixture, row.get("source", ""), never) for row in rows]
    size_bytes = 0
    for row in rows:
        messages = row.get("messages", [])
        if row.get("source") == SMALLTALK:
            messages = renamed(messages, mixture)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        size_bytes += sum(len(text.encode()) for text in [*said, row.get("text", "")])
    return plain, size_bytes


def main() -> None:
    """Write every array of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the training bundle (holds DATA.md)"
    )
    parser.add_argument("--run", type=Path, required=True, help="folder with tokenizer.json; arrays go here")
    parser.add_argument("--mixture", type=Path, default=Path(__file__).with_name("mixture.toml"))
    parser.add_argument("--only", choices=("valid", *ARRAYS), help="write one part (default: all)")
    args = parser.parse_args()
    mixture = Mixture.load(args.mixture)
    encoder = ChatEncoder.load(args.run / "tokenizer.json")
    parts = (args.only,) if args.only else ("valid", *ARRAYS)
    if "valid" in parts:
        without_system = Mixture.load(args.mixture).without_system()
        sizes: dict[str, int] = {}
        for kind in ("text", "chat"):
            found, sizes[kind] = held_back(without_system, args.data, encoder, kind)
            tokens = mixture.stages["pretrain"].row_tokens
            write(
                args.run, f"valid_{kind}", concatenate(found, tokens) if kind == "text" else pack(found, 1024)
            )
        (args.run / "valid.json").write_text(json.dumps(sizes), "utf-8")
    if "pretrain" in parts:
        found = documents(mixture, "pretrain", args.data, encoder)
        write(args.run, "pretrain", concatenate(found, mixture.stages["pretrain"].row_tokens))
    for stage in parts:
        if stage in ARRAYS[1:]:
            found = documents(mixture, stage, args.data, encoder)
            write(args.run, stage, pack(found, mixture.stages[stage].row_tokens))


if __name__ == "__main__":
    main()
