"""Passages of documents: how a text is cut, and which passages answer a question best.

Two rankings are fused by reciprocal rank: the words that question and passage share (BM25), and how near
their embeddings lie. Words alone decide where there are no embeddings.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bise.assistant.wording import words_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Matrix = npt.NDArray[np.float32]

SIZES = (1200, 800, 500, 300, 200)
"""Characters of a passage: the first size of which MIN_PASSAGES fit the room that there is."""
MIN_PASSAGES = 4
FUSION = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)."""
PASSAGE_OVERHEAD = 16
"""Tokens of a passage's number and name in the prompt, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A part of a document: `text` is characters `start` to `end` of the document's text."""

    number: int
    start: int
    end: int
    page: int | None
    text: str


def passage_size(room: float, tokens_per_char: float) -> int:
    """Return how many characters passages should have where `room` tokens are left for all of them."""
    share = room / MIN_PASSAGES - PASSAGE_OVERHEAD
    return next((size for size in SIZES if size * tokens_per_char <= share), SIZES[-1])


def cut_passages(text: str, pages: Sequence[Sequence[int]] = (), size: int = SIZES[0]) -> list[Passage]:
    """Return a text in pieces of at most `size` characters, cut at paragraphs, lines, sentences or words.

    `pages` holds (page, character where it begins), in order. White space at the ends belongs to no passage.
    """
    starts = [place for _, place in pages]
    found: list[Passage] = []
    start = 0
    while start < len(text):
        end = min(len(text), start + size)
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                cut = text.rfind(mark, start + size // 2, end)
                if cut > 0:
                    end = cut + len(mark)
                    break
        piece = text[start:end]
        stripped = piece.strip()
        if stripped:
            first = start + len(piece) - len(piece.lstrip())
            at = bisect_right(starts, first)
            page = pages[at - 1][0] if at else None
            number, last = len(found), first + len(stripped)
            found.append(Passage(number=number, start=first, end=last, page=page, text=stripped))
        start = end
    return found


def by_words(texts: Sequence[str], question: str) -> list[int]:
    """Return the indices of texts that share words with a question, the best first (BM25, k1 1.2, b 0.75)."""
    bags = [Counter(words_of(text)) for text in texts]
    lengths = [sum(bag.values()) for bag in bags]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    asked = set(words_of(question))
    seen = Counter(word for bag in bags for word in asked & bag.keys())
    scores: list[float] = []
    for bag, length in zip(bags, lengths, strict=True):
        total = 0.0
        for word in sorted(asked & bag.keys()):
            rarity = math.log(1 + (len(bags) - seen[word] + 0.5) / (seen[word] + 0.5))
            total += rarity * bag[word] * 2.2 / (bag[word] + 1.2 * (0.25 + 0.75 * length / mean))
        scores.append(total)
    matching = [index for index, score in enumerate(scores) if score > 0]
    return sorted(matching, key=lambda index: (-scores[index], index))


def by_meaning(vectors: Matrix, question: Matrix) -> list[int]:
    """Return the indices of all vectors [n, E], those nearest to the question's [E] first.

    What all texts of a language model have in common is their mean; it is taken away first, else every text
    looks like every other one.
    """
    import numpy as np

    mean = vectors.mean(axis=0)
    rows, asked = vectors - mean, question - mean
    tiny = np.finfo(np.float32).tiny
    near = rows @ asked / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(asked), tiny)
    return [int(index) for index in np.argsort(-near, kind="stable")]


def fuse(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of all rankings, the best first, by the sum of 1 / (FUSION + rank)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, index in enumerate(ranking, 1):
            scores[index] = scores.get(index, 0.0) + 1.0 / (FUSION + rank)
    return sorted(scores, key=lambda index: (-scores[index], index))


def take(ranked: Sequence[int], sizes: Sequence[float], room: float, most: int) -> list[int]:
    """Return the first indices whose sizes, in tokens, fit into `room`, at most `most`, in reading order.

    A passage that does not fit is passed over. Where nothing was found the texts' beginning is taken.
    """
    chosen: list[int] = []
    for index in ranked or range(len(sizes)):
        need = math.ceil(sizes[index]) + PASSAGE_OVERHEAD
        if need > room:
            continue
        room -= need
        chosen.append(index)
        if len(chosen) == most:
            break
    return sorted(chosen)
