"""What holding an output to a grammar costs: compiling, masks, and following the tokens.

    python benchmarks/structured.py [--outputs 20]

Processor time of this process, over the 131,072 tokens of Tekken, whose file comes with mistral-common.
Outputs are those of a model that finds all allowed tokens equally likely, up to 200 tokens. `compile` is
the time from source to the first mask, `memory` the growth of this process's peak over all of them
together; `refused` are sources that are too much, and how long it takes to say so. Prints one line per
grammar, and one JSON document last.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time
from importlib import resources
from pathlib import Path

from bise.errors import RequestError
from bise.grammar.compiler import compile_grammar
from bise.grammar.follower import Follower
from bise.grammar.spec import GrammarSpec
from bise.grammar.vocabulary import Vocabulary
from bise.text.mistral_tokenizer import MistralFile, load_mistral_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "string", "format": "date"},
        "height": {"type": "number", "minimum": 0.3, "maximum": 2.6},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 8},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "code": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "code"],
        },
    },
    "required": ["name", "born", "tags", "address"],
}
WIDE = {
    "type": "object",
    "properties": {f"field_{number}": {"type": ["string", "integer", "null"]} for number in range(300)},
}
GRAMMARS = {
    "person": GrammarSpec.json_schema(PERSON),
    "any JSON": GrammarSpec.json_object(),
    "300 fields": GrammarSpec.json_schema(WIDE),
    "1,000 choices": GrammarSpec.choice([f"choice number {number}" for number in range(1000)]),
    "regex": GrammarSpec.regex(r"[a-z]+(-[0-9]{2,4}){1,20}"),
    "Lark": GrammarSpec.lark('start: e\ne: t (("+"|"-") t)*\nt: NUM | "(" e ")"\nNUM: /[0-9]{1,9}/'),
}
TOO_MUCH = {
    "a long pattern": GrammarSpec.json_schema(
        {"type": "string", "pattern": "a.{40}b.{40}c", "maxLength": 500}
    ),
    "wide repeats": GrammarSpec.regex("([a-z]{1,40}[0-9]{1,40}){1,40}" * 20),
    "deep choices": GrammarSpec.json_schema({"allOf": [{"anyOf": [True] * 9}] * 9}),
}


WARM = 5
"""Outputs that come first and do not count: they fill the engine's automaton, which all outputs share."""


def measure(name: str, spec: GrammarSpec, vocabulary: Vocabulary, outputs: int) -> dict[str, float | str]:
    """Return what one grammar costs, in milliseconds and microseconds."""
    began = time.process_time()
    compiled = compile_grammar(spec, vocabulary)
    compile_s = time.process_time() - began
    rng = random.Random(0)
    masks: list[float] = []
    takes: list[float] = []
    for number in range(WARM + outputs):
        follower = Follower(compiled, vocabulary)
        if number == WARM:
            masks.clear()
            takes.clear()
        for left in range(200, 0, -1):
            if follower.must_end:
                break
            began = time.process_time()
            allowed = follower.allowed(left)
            masked = time.process_time()
            if allowed is None or not allowed.size:
                break
            token = int(allowed[rng.randrange(allowed.size)])
            chosen = time.process_time()
            if follower.take(token, left) is None:
                break
            takes.append(time.process_time() - chosen)
            masks.append(masked - began)
    return {
        "grammar": name,
        "compile_ms": 1e3 * compile_s,
        "mask_us": 1e6 * statistics.fmean(masks),
        "mask_p90_us": 1e6 * statistics.quantiles(masks, n=10)[-1],
        "take_us": 1e6 * statistics.fmean(takes),
        "tokens": len(takes),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--outputs", type=int, default=20)
    options = parser.parse_args()
    path = Path(str(resources.files("mistral_common"))) / "data" / "tekken_240911.json"
    tokenizer = load_mistral_tokenizer(MistralFile(path=path, kind="tekken"), 131_072)
    vocabulary = Vocabulary(tokenizer, 131_072)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [measure(name, spec, vocabulary, options.outputs) for name, spec in GRAMMARS.items()]
    refused: dict[str, float] = {}
    for name, spec in TOO_MUCH.items():
        began = time.process_time()
        try:
            compile_grammar(spec, vocabulary)
        except RequestError:
            refused[name] = 1e3 * (time.process_time() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for row in rows:
        sys.stdout.write(
            f"{row['grammar']:14}: compile {row['compile_ms']:6.1f} ms, mask {row['mask_us']:5.1f} us "
            f"(nine of ten below {row['mask_p90_us']:5.1f}), token taken {row['take_us']:5.1f} us, "
            f"{row['tokens']} tokens\n"
        )
    for name, took in refused.items():
        sys.stdout.write(f"{name:14}: refused after {took:6.1f} ms\n")
    sys.stdout.write(f"memory {grown:.1f} MiB more at the peak, all together\n")
    sys.stdout.write(json.dumps({"structured": rows, "refused_ms": refused, "grown_mib": grown}) + "\n")


if __name__ == "__main__":
    main()
