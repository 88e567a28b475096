"""The identity matrix, a release gate: however a request is computed, it returns the same bits.

Every way to compute (who else runs and when they come, chunks, threads, prefix cache, preemption, guesses) is
crossed with every other, for a dense and an expert model, for 16 and 8 bit keys and values. Half of the
requests are greedy, half are sampled. `make identities` takes all of it; CI takes the few ways in which any
two values of any two dimensions meet once, since what goes wrong takes two features that meet.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest

from bise.engine.engine import Engine
from bise.engine.payoff import Payoff
from bise.engine.request import Completion, Request, SamplingParams
from bise.engine.speculation import Guess, Speculation

SETTINGS = {
    (model, kv_format): packed_format
    for model in ("interleaved", "8 experts")
    for kv_format, packed_format in (("f16", "q8"), ("q16", "q8"), ("q8", "q4"))
}
"""(model, KV format) to the format of its weights."""

MOST = 32
SHARED = tuple(random.Random(1).randrange(256) for _ in range(80))
"""What half of the prompts begin with: two whole blocks and a half."""


@dataclass(frozen=True)
class Way:
    """How requests are computed."""

    batch: int
    """Requests at once."""
    arrival: str
    """`together`, or one by one at `random` steps."""
    chunk: int
    """Tokens per step at most."""
    threads: int
    prefix: str
    """Prefix cache `off`, `cold`, or `warm`: everything was asked once before."""
    is_tight: bool
    """So few blocks that sequences are preempted."""
    guesses: str
    """`off`, from the text's own `repeats`, or `known`: from the right output, with errors put in."""

    def __str__(self) -> str:
        tight = "tight" if self.is_tight else "roomy"
        return f"{self.batch}-{self.arrival}-{self.chunk}-{self.threads}-{self.prefix}-{tight}-{self.guesses}"


WAYS = [
    Way(*values)
    for values in itertools.product(
        (1, 2, 3, 8, MOST),
        ("together", "random"),
        (6, 40, 512),
        (1, 2),
        ("off", "cold", "warm"),
        (False, True),
        ("off", "repeats", "known"),
    )
    if values[0] > 1 or (values[1] == "together" and not values[5])
]
DIMENSIONS = tuple(Way.__dataclass_fields__)


def pairs(way: Way) -> set[tuple[str, object, str, object]]:
    """Return every two values that meet in a way, with the names of their dimensions."""
    return {
        (one, getattr(way, one), other, getattr(way, other))
        for one, other in itertools.combinations(DIMENSIONS, 2)
    }


def covering_sample() -> list[Way]:
    """Return ways in which every pair of values meets that meets in any way: greedily, the same each time."""
    left = set().union(*map(pairs, WAYS))
    order = random.Random(0).sample(WAYS, len(WAYS))
    chosen: list[Way] = []
    while left:
        chosen.append(max(order, key=lambda way: len(pairs(way) & left)))
        left -= pairs(chosen[-1])
    return chosen


SAMPLE = covering_sample()


def requests() -> list[Request]:
    """Return the workload: even ones greedy, odd ones sampled."""
    rng = random.Random(2)
    made: list[Request] = []
    for index in range(MOST):
        # Four short prompts with long outputs in a row: where blocks are few, they outgrow them together.
        shares = index % 8 not in (2, 3, 4, 5)
        start = (256, *SHARED) if shares else (256,)
        prompt = (*start, *(rng.randrange(256) for _ in range(rng.randrange(30))))
        sampled = (
            {"temperature": 0.9, "top_p": 0.95},
            {"temperature": 1.2, "repetition_penalty": 1.2, "presence_penalty": 0.4},
            {"temperature": 0.6, "top_k": 30, "min_tokens": 5},
        )[index % 3]
        params = SamplingParams(
            seed=index,
            max_tokens=rng.randrange(4, 12) if shares else rng.randrange(34, 44),
            ignore_eos=not shares,
            logprobs=2,
            **({"temperature": 0} if index % 2 == 0 else sampled),
        )
        made.append(Request(token_ids=prompt, params=params, prompt_logprobs=index % 8 == 5))
    return made


REQUESTS = requests()


class Always(Payoff):
    """Takes every guess, so that the machine's speed has no say in what is tested."""

    def wants(self, num_sequences: int, lanes=()) -> bool:
        return True

    def choose(self, chances, lane=None) -> tuple[list[int], float]:
        return [min(len(row), 5) for row in chances], 1.0


def speculation(way: Way, known: list[Completion]) -> Speculation | None:
    if way.guesses == "off":
        return None
    if way.guesses == "repeats":
        return Speculation(payoff=Always())

    def guess(sequence, count: int) -> Guess:
        start = sequence.num_output
        right = known[sequence.params.seed].token_ids[start : start + count]
        tokens = [(token + (start + at) % 4 // 3) % 258 for at, token in enumerate(right)]
        return Guess(tokens, [0] * len(tokens), [1.0] * len(tokens))

    return Speculation(payoff=Always(), guesser=guess)


def bits(done: Completion) -> tuple:
    usage = replace(done.usage, cached_tokens=0)
    return (done.token_ids, done.text, done.finish_reason, done.logprobs, done.prompt_logprobs, usage)


def make_engine(transformer, ops, tokenizer, kv_format: str, way: Way, known: list[Completion]) -> Engine:
    return Engine(
        transformer,
        ops,
        config=transformer.config,
        tokenizer=tokenizer,
        kv_format=kv_format,
        num_blocks=5 if way.is_tight else 200,
        max_step_tokens=way.chunk,
        max_sequences=min(way.chunk, MOST),
        prefix_cache=way.prefix != "off",
        speculation=speculation(way, known),
        threaded=False,
    )


def run(engine: Engine, way: Way) -> list[Completion]:
    """Return what the first `way.batch` requests return (for a batch of one: each of four on its own)."""
    rng = random.Random(str(way))
    if way.batch == 1:
        return [engine.submit(request).result() for request in REQUESTS[:4]]
    handles = []
    for request in REQUESTS[: way.batch]:
        handles.append(engine.submit(request))
        for _ in range(rng.randrange(5) if way.arrival == "random" else 0):
            engine.step()
    return [handle.result() for handle in handles]


PLAIN = Way(1, "together", 512, 1, "off", False, "off")


@pytest.fixture(scope="module")
def known(cpu_model, byte_tokenizer):
    """Return a function that gives what each request returns alone, whole and without any help."""
    found: dict[tuple[str, str], list[Completion]] = {}

    def alone(model: str, kv_format: str) -> list[Completion]:
        if (model, kv_format) not in found:
            transformer, ops = cpu_model(model, SETTINGS[model, kv_format], 1)
            found[model, kv_format] = [
                make_engine(transformer, ops, byte_tokenizer, kv_format, PLAIN, []).submit(request).result()
                for request in REQUESTS
            ]
        return found[model, kv_format]

    return alone


@pytest.fixture(scope="module")
def check(cpu_model, byte_tokenizer, known):
    """Return a function that asserts the identity, and that what a way is about did happen."""

    def compare(model: str, kv_format: str, way: Way) -> None:
        expected = known(model, kv_format)
        transformer, ops = cpu_model(model, SETTINGS[model, kv_format], way.threads)
        engine = make_engine(transformer, ops, byte_tokenizer, kv_format, way, expected)
        if way.prefix == "warm":
            run(engine, way)
        found = run(engine, way)
        for index, done in enumerate(found):
            assert bits(done) == bits(expected[index]), f"{way}: request {index} differs"
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
        if way.prefix == "warm" and not way.is_tight:
            assert sum(done.usage.cached_tokens for done in found) > 0
        if way.is_tight and way.batch == MOST and way.chunk == 512:
            assert stats.num_preemptions > 0
        if way.guesses == "known" and way.chunk > 6:
            assert 0 < engine.speculation.stats.num_accepted < engine.speculation.stats.num_drafted

    return compare


@pytest.mark.parametrize("way", SAMPLE, ids=str)
@pytest.mark.parametrize(("model", "kv_format"), SETTINGS)
def test_a_sample_of_the_matrix_gives_the_same_bits(check, model, kv_format, way):
    check(model, kv_format, way)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guesses", ["off", "repeats", "known"])
@pytest.mark.parametrize("prefix", ["off", "cold", "warm"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("model", "kv_format"), SETTINGS)
def test_the_whole_matrix_gives_the_same_bits(check, model, kv_format, threads, prefix, guesses):
    for way in WAYS:
        if (way.threads, way.prefix, way.guesses) == (threads, prefix, guesses):
            check(model, kv_format, way)


def test_the_sample_and_the_workload_have_every_kind():
    assert set().union(*map(pairs, SAMPLE)) == set().union(*map(pairs, WAYS))
    assert {request.params.temperature == 0 for request in REQUESTS} == {True, False}
    assert any(request.prompt_logprobs for request in REQUESTS)
