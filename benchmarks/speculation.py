"""Measure what guessing ahead gains on three kinds of output, at the speed of a real model.

    python benchmarks/speculation.py [--shape mistral-7b | --embedded] [--layers N] [--quant q4] [--threads N]
                                     [--rounds 3] [--out FILE]

What is measured, exactly. Every weight of the shape is computed in every step, and decoding is timed by wall
clock, the prompt excluded. The weights are random, so the model would write noise; therefore the *text* is
given: after the real computation the scores of the given next token are raised so that it is chosen. Whether
a guess comes true depends on the text alone, what it costs on the model alone, so this is the speed that a
trained model of the shape would have if it wrote these texts. With `--embedded` the weights are those of the
model that comes with bise, and prompts are cut to its context. The texts are in `speculation_texts/`:
article, summary, question and answer were written for this benchmark, the code is a file of bise.

    summary      prompt: the article; output: its summary, which quotes as summaries do
    edit         prompt: a file; output: the file with a name changed throughout and one method added
    edit+given   the same with the file as OpenAI's `prediction`
    chat         prompt: a question; output: the answer
    noise        prompt and output: random tokens, where guessing cannot help

Plain and guessing rounds alternate; every guessing round begins with a gate that knows nothing of the
machine and the text, as after a start. The output is asserted to be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import mistral_common
import numpy as np

from bise.bench.report import provenance
from bise.bench.synthetic import random_weights
from bise.config import ModelConfig, default_threads
from bise.engine.engine import Engine
from bise.engine.load import load_text
from bise.engine.memory import kv_bytes
from bise.engine.request import Request, SamplingParams
from bise.engine.speculation import Speculation
from bise.hub.embedded import embedded_path
from bise.kernels.cpu import CpuOps
from bise.model.checkpoint import open_model
from bise.model.packed import load_packed
from bise.model.transformer import Transformer
from bise.plan import known_shape, shape_source
from bise.text.mistral_tokenizer import MistralFile, load_mistral_tokenizer
from bise.text.tokenizer import Tokenizer

TEXTS = Path(__file__).resolve().parent / "speculation_texts"
CONTEXT = 4096
MOST_TOKENS = 256
"""Output tokens that are timed per workload."""


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    prediction: tuple[int, ...] = ()


class Scripted:
    """A model that computes everything and then has the next token of a given text win."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.text: tuple[int, ...] = ()
        self._model = model
        self._next: list[int] = []

    def forward(self, batch: Any, cache: Any = None) -> Any:
        self._next = [self.text[batch.positions[row] + 1] for row in batch.logit_rows]
        return self._model.forward(batch, cache)

    def logits(self, hidden: Any) -> Any:
        scores = self._model.logits(hidden)
        scores[np.arange(len(self._next)), self._next] = 1e4
        return scores


def workloads(tokenizer: Tokenizer, vocab_size: int, context: int) -> list[Workload]:
    """Return the workloads in a model's tokens, prompts cut to what its context leaves for them."""
    room = context - MOST_TOKENS - 64

    def ids(name: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode((TEXTS / name).read_text(encoding="utf-8")))

    code = (TEXTS / "code.txt").read_text(encoding="utf-8")
    edited = code.replace("owner", "holder").replace(
        "    def num_owners",
        "    def is_free(self, block: int) -> bool:\n"
        '        """Return True when nobody holds `block`."""\n'
        "        return not self._holders[block]\n\n    def num_owners",
    )
    before, after = tuple(tokenizer.encode(code)), tuple(tokenizer.encode(edited))
    rng = random.Random(0)
    noise = tuple(rng.randrange(3, vocab_size) for _ in range(2 * MOST_TOKENS))
    ask = tuple(tokenizer.encode("Write a summary of this article."))
    change = tuple(tokenizer.encode("Rename owner to holder in this file, and add a method is_free."))
    return [
        Workload("summary", (1, *ask, *ids("article.txt")[:room]), ids("summary.txt")),
        Workload("edit", (1, *change, *before[:room]), after),
        Workload("edit+given", (1, *change, *before[:room]), after, before),
        Workload("chat", (1, *ids("question.txt")), ids("answer.txt")),
        Workload("noise", (1, *noise[:MOST_TOKENS]), noise[MOST_TOKENS:]),
    ]


def timed(
    engine: Engine, model: Scripted, work: Workload, *, speculate: bool
) -> tuple[float, tuple[int, ...]]:
    """Return (tokens per second of decoding, output)."""
    model.text = work.prompt + work.output
    params = SamplingParams(temperature=0, max_tokens=min(MOST_TOKENS, len(work.output) - 1))
    request = Request(token_ids=work.prompt, params=params, prediction=work.prediction, speculate=speculate)
    done = engine.submit(request).result()
    return (len(done.token_ids) - 1) / done.timings.decode_s, done.token_ids


def measure(engine: Engine, model: Scripted, work: Workload, rounds: int) -> dict[str, Any]:
    speculation = engine.speculation
    assert speculation is not None
    plain: list[float] = []
    guessing: list[float] = []
    timed(engine, model, work, speculate=False)  # warm-up; the prompt stays in the prefix cache
    for _ in range(rounds):
        rate, expected = timed(engine, model, work, speculate=False)
        plain.append(rate)
        speculation.forget()
        rate, found = timed(engine, model, work, speculate=True)
        guessing.append(rate)
        assert found == expected == work.output[: len(found)], "guessing changed the output"
    stats = speculation.stats
    return {
        "workload": work.name,
        "prompt_tokens": len(work.prompt),
        "output_tokens": len(found),
        "plain_tokens_per_s": median(plain),
        "guessing_tokens_per_s": median(guessing),
        "speed_up": median(guessing) / median(plain),
        "tokens_per_step": len(found) / (stats.num_steps + 1),
        "drafted": stats.num_drafted,
        "accepted": stats.num_accepted,
        "plain_rounds": plain,
        "guessing_rounds": guessing,
    }


def chosen_model(
    options: argparse.Namespace, ops: CpuOps
) -> tuple[ModelConfig, Mapping[str, object], Tokenizer, str]:
    """Return configuration, weights, tokenizer and name of what is measured."""
    if options.embedded:
        source = open_model(embedded_path())
        packed, _ = load_packed(source, "auto", ops)
        return source.config, packed.weights(ops), load_text(source)[0], "brise, the embedded one"
    source = known_shape(options.shape)
    layers = options.layers or source.config.num_layers
    config = dataclasses.replace(
        source.config, num_layers=layers, windows=source.config.windows[:layers], max_context=CONTEXT
    )
    weights = random_weights(shape_source(options.shape, config), options.quant, ops).weights(ops)
    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    tokenizer = load_mistral_tokenizer(MistralFile(path=file, kind="spm"), config.vocab_size)
    return config, weights, tokenizer, f"{options.shape}, {layers} layers, random {options.quant} weights"


def write(options: argparse.Namespace, name: str, isa: str, results: list[dict[str, Any]]) -> None:
    """Write the results so far to the file that was asked for."""
    if options.out is None:
        return
    document = {
        "benchmark": "speculation",
        "model": f"{name}, text given",
        "kv": options.kv,
        **provenance(shlex.join(["python", *sys.argv]), options.threads, isa),
        "results": results,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measure every workload, print a table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="mistral-7b", help="a known shape with a vocabulary of 32,000 or more"
    )
    parser.add_argument("--embedded", action="store_true", help="the model that comes with bise")
    parser.add_argument("--layers", type=int, help="so many of its layers")
    parser.add_argument("--quant", default="q4", help="width of the weights")
    parser.add_argument("--kv", default="f16", help="storage of keys and values")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    ops = CpuOps(options.threads)
    config, weights, tokenizer, name = chosen_model(options, ops)
    model = Scripted(Transformer(config, weights, ops))
    results: list[dict[str, Any]] = []
    for work in workloads(tokenizer, config.vocab_size, config.max_context):
        engine = Engine(
            model,
            ops,
            config=config,
            tokenizer=None,
            kv_format=options.kv,
            kv_memory_bytes=kv_bytes(config, config.max_context, options.kv, 1),
            max_sequences=8,
            speculation=Speculation(),
            threaded=False,
        )
        with engine:
            entry = measure(engine, model, work, options.rounds)
        results.append(entry)
        write(options, name, ops.isa, results)  # kept after every workload
        print(
            f"{entry['workload']:<12}{entry['plain_tokens_per_s']:8.2f} tok/s plain"
            f"{entry['guessing_tokens_per_s']:8.2f} guessing{entry['speed_up']:7.2f}x"
            f"{entry['tokens_per_step']:6.2f} per step, {entry['accepted']} of {entry['drafted']} guesses",
            file=sys.stderr,
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
