"""Measure an exported brise on the held-back rows: loss, bits per byte, exact match, ten samples by rule.

    python recipes/brise/evaluate.py --run RUN --data DATA --model brise

Losses come from bise's network in PyTorch, answers from bise's engine, both over float32 weights. Any model
with brise's vocabulary will do. Writes RUN/evaluation.json and prints it. Exact
match: the greedy answer to every first user turn, lower-cased and without punctuation, equals the held-back
answer.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from chat import BOS, EOS, ChatEncoder
from data import WORDNET, word_counts
from drills import definition, meanings
from mixture import SMALLTALK, Message, Mixture, read_rows, renamed
from torch.nn import functional
from train import Rows

from bise.engine.engine import Engine
from bise.engine.handle import RequestHandle
from bise.engine.load import load_model
from bise.engine.request import Request, SamplingParams
from bise.model.batch import training_batch
from bise.model.checkpoint import open_model
from bise.model.transformer import Transformer
from bise.train.network import read_weights
from bise.train.rows import RowOps

ANSWER_TOKENS = 128
"""Longest greedy answer."""
SCORE_BATCH = 32
COMMONEST = 500
"""Of the drilled words, those counted apart."""
PROMPTS_AT_ONCE = 256
"""Submitted; the engine takes up as many as it has room for."""
SEQUENCES = 32
"""Prompts of full length that the engine has memory for; the shorter they are, the more run together."""
SAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Exact match of one source."""

    rows: int = 0
    matched: int = 0
    numbers: int = 0
    """Rows whose held-back answer holds a number."""
    number_matched: int = 0
    """Of these, rows whose answer ends on the same number, however it is worded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Loss over one held-back set."""

    tokens: int
    nats_per_token: float
    bits_per_byte: float


class Scorer:
    """A model that scores rows of equal length, in float32."""

    def __init__(self, model: Path) -> None:
        """Read the model in a directory."""
        source = open_model(model)
        self.config = source.config
        self._model = Transformer(source.config, read_weights(source, "cpu"), RowOps())

    def hidden(self, ids: np.ndarray) -> torch.Tensor:
        """Return hidden states [S, L, E] of rows [S, L]."""
        with torch.no_grad():
            batch = training_batch(ids.astype(np.int32), len(self.config.window_groups))
            return self._model.forward(batch).view(*ids.shape, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores [R, V] of hidden states [R, E]."""
        with torch.no_grad():
            return self._model.logits(hidden)


def loss_of(scorer: Scorer, run: Path, name: str, size_bytes: int) -> Loss:
    """Return the loss over every learned token of a held-back set of data.py."""
    rows = Rows(run, name, 1, 0)
    total = 0.0
    tokens = 0
    for first in range(0, rows.steps_per_pass, SCORE_BATCH):
        index = np.arange(first, min(first + SCORE_BATCH, rows.steps_per_pass))
        ids, targets, share = rows.rows(index)
        hidden = scorer.hidden(ids.view(len(index), -1).numpy())
        for row in range(len(index)):
            span = slice(row * rows.row_tokens, (row + 1) * rows.row_tokens)
            losses = functional.cross_entropy(scorer.logits(hidden[row]), targets[span], reduction="none")
            learned = share[span] > 0
            total += float(losses[learned].double().sum())
            tokens += int(learned.sum())
    return Loss(
        tokens=tokens,
        nats_per_token=round(total / tokens, 4),
        bits_per_byte=round(total / math.log(2) / size_bytes, 4),
    )


def answers(engine: Engine, prompts: list[list[int]], limit: int, context: int) -> list[list[int]]:
    """Return the greedy continuation of every prompt, at most `limit` tokens, without its end token.

    A prompt that fills the context has none. What runs beside a prompt does not change its answer.
    """
    found: list[list[int]] = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        handles: list[RequestHandle | None] = []
        for prompt in prompts[first : first + PROMPTS_AT_ONCE]:
            room = min(limit, context - len(prompt))
            params = SamplingParams(temperature=0, max_tokens=max(0, room))
            request = Request(token_ids=tuple(prompt), params=params)
            handles.append(engine.submit(request) if room > 0 else None)
        found += [[] if handle is None else list(handle.result().token_ids) for handle in handles]
    return [ids[:-1] if ids and ids[-1] == EOS else ids for ids in found]


def normal(text: str) -> str:
    """Return `text` in lower case, without punctuation, blanks folded."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def last_number(text: str) -> str | None:
    """Return the last run of digits in `text`."""
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def exact_match(
    answer: Callable[[list[list[int]]], list[list[int]]], encoder: ChatEncoder, mixture: Mixture, data: Path
) -> tuple[dict[str, Match], list[dict[str, str]]]:
    """Return matches by source over the held-back chats, and the first SAMPLES prompts with their answers."""
    rows = list(read_rows(data / "valid" / "chat.jsonl.zst"))
    turns: list[tuple[str, list[Message]]] = []
    for row in rows:
        messages = row.get("messages", [])
        source = row.get("source", "")
        turns.append((source, renamed(messages, mixture) if source == SMALLTALK else messages))
    prompts = [encoder.chat(messages[:1]).ids for _, messages in turns]
    assert all(prompt[0] == BOS for prompt in prompts)
    said = [encoder.decode(ids) for ids in answer(prompts)]
    matches: dict[str, Match] = {}
    for (source, messages), text in zip(turns, said, strict=True):
        before, wanted = matches.get(source, Match()), messages[1]["content"]
        number = last_number(wanted)
        matches[source] = Match(
            rows=before.rows + 1,
            matched=before.matched + (normal(text) == normal(wanted)),
            numbers=before.numbers + (number is not None),
            number_matched=before.number_matched + (number is not None and last_number(text) == number),
        )
    samples = [
        {"prompt": messages[0]["content"], "answer": text, "held_back": messages[1]["content"]}
        for (_, messages), text in zip(turns[:SAMPLES], said, strict=False)
    ]
    return dict(sorted(matches.items())), samples


def recall(
    answer: Callable[[list[list[int]]], list[list[int]]], encoder: ChatEncoder, mixture: Mixture, data: Path
) -> dict[str, int]:
    """Return how many of the drilled meanings come back word for word: what was learnt by heart, no more."""
    known = meanings(read_rows(data / WORDNET), word_counts(data), mixture.drills["words"])
    prompts = [encoder.chat([{"role": "user", "content": f"Define {word}."}]).ids for word in known]
    said = [normal(encoder.decode(ids)) for ids in answer(prompts)]
    right = [
        text == normal(definition(word, kind, meaning))
        for text, (word, (kind, meaning)) in zip(said, known.items(), strict=True)
    ]
    return {
        "words": len(known),
        "right": sum(right),
        "common_words": COMMONEST,
        "common_right": sum(right[:COMMONEST]),
    }


def main() -> None:
    """Evaluate an export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with the held-back arrays")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training bundle")
    parser.add_argument("--model", type=Path, required=True, help="exported directory")
    parser.add_argument("--out", type=Path, help="what to write; default: RUN/evaluation.json")
    parser.add_argument(
        "--ask", action="append", default=[], help="only answer this prompt (may be repeated)"
    )
    parser.add_argument("--mixture", type=Path, default=Path(__file__).with_name("mixture.toml"))
    args = parser.parse_args()
    mixture = Mixture.load(args.mixture)
    encoder = ChatEncoder.load(args.model / "tokenizer.json")
    # Float32 weights: what is measured is the model, not a rounding of it.
    loaded = load_model(args.model, quant="none", max_sequences=SEQUENCES)
    context = loaded.source.config.max_context

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        return answers(loaded.engine, prompts, ANSWER_TOKENS, context)

    if args.ask:
        prompts = [encoder.chat([{"role": "user", "content": text}]).ids for text in args.ask]
        for text, ids in zip(args.ask, answer(prompts), strict=True):
            print(f"> {text}\n{encoder.decode(ids)}\n")
        loaded.close()
        return
    scorer = Scorer(args.model)
    sizes = json.loads((args.run / "valid.json").read_text("utf-8"))
    losses = {
        kind: asdict(loss_of(scorer, args.run, f"valid_{kind}", sizes[kind])) for kind in ("text", "chat")
    }
    matches, samples = exact_match(answer, encoder, mixture, args.data)
    result = {
        "loss": losses,
        "exact_match": {source: asdict(match) for source, match in matches.items()},
        "definitions": recall(answer, encoder, mixture, args.data),
        "samples": samples,
    }
    loaded.close()
    out = args.out or args.run / "evaluation.json"
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False), "utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
