"""A step under way is broken off for who asks for less, changes no output by it, and not too often."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from bise.engine import interrupt
from bise.engine.fairness import FairQueue
from bise.engine.interrupt import Interrupted, Interrupts
from bise.engine.payoff import Payoff
from bise.engine.request import Request, SamplingParams
from bise.engine.sequence import Sequence
from bise.engine.speculation import Guess, Speculation

LAYERS = (None, 48, None)


def ask(text, tenant, priority=0, max_tokens=40):
    params = SamplingParams(max_tokens=max_tokens, seed=len(text), ignore_eos=True, logprobs=1)
    return Request(token_ids=(256, *text.encode()), params=params, tenant=tenant, priority=priority)


CROWD = [ask(letter * (10 + 7 * number), "large") for number, letter in enumerate("abcdefghij")]
FEW = [ask("a" * 15, "large"), ask("b" * 16, "large")]


class Always(Payoff):
    """Takes every guess."""

    def wants(self, num_sequences, lanes=()):
        return True

    def choose(self, chances, lane=None):
        return [len(row) for row in chances], 1.0


class Arrivals:
    """Submits requests while a step is between two of its layers."""

    def __init__(self, engine, model):
        self.due: list[Request] = []
        self.handles = []
        self._engine, self._forward = engine, model.forward
        model.forward = self.forward
        engine._runner._can_break_off = True

    def forward(self, batch, cache):
        def layer(index):
            if index == 1 and self.due:
                self.handles.append(self._engine.submit(self.due.pop(0)))
            return cache.layer(index)

        return self._forward(batch, SimpleNamespace(layer=layer))


@pytest.fixture
def crowded(hash_engine, monkeypatch):
    """Return a function that gives an engine whose crowd decodes, with what brings newcomers within steps."""

    def make(crowd=CROWD, **options):
        monkeypatch.setattr(interrupt, "SHARE", 1e6)
        engine, model = hash_engine(*LAYERS, num_blocks=120, **options)
        handles = [engine.submit(request) for request in crowd]
        for _ in range(2):
            engine.step()
        return engine, Arrivals(engine, model), handles

    return make


def bits(done):
    return done.token_ids, done.logprobs, done.finish_reason


def test_the_step_is_thrown_away_and_the_next_one_brings_the_newcomers_first_token(crowded):
    engine, arrivals, handles = crowded()
    arrivals.due.append(ask("Hello", "small"))
    before = [sequence.num_output for sequence in engine._scheduler.running]
    assert engine.step()
    assert engine._interrupts.count == 1
    assert [sequence.num_output for sequence in engine._scheduler.running] == before
    engine.step()
    newcomer = next(s for s in engine._scheduler.running if s.request.tenant == "small")
    assert newcomer.num_output == 1
    assert len(handles) == len(before)


def test_what_was_broken_off_is_computed_again_to_the_same_bits(crowded, hash_engine):
    engine, arrivals, handles = crowded()
    newcomers = [ask("small talk " * (number + 1), "small", max_tokens=2) for number in range(5)]
    for newcomer in newcomers:
        arrivals.due.append(newcomer)
        for _ in range(5):
            assert engine.step()
            engine._scheduler.check_integrity()
    assert engine._interrupts.count == 5
    quiet, _ = hash_engine(*LAYERS, num_blocks=120, prefix_cache=False)
    for request, handle in zip([*CROWD, *newcomers], [*handles, *arrivals.handles], strict=True):
        assert bits(handle.result()) == bits(quiet.submit(request).result())


def test_the_blocks_of_guesses_are_given_back(crowded):
    def guess(sequence, count):
        return Guess([1] * count, [0] * count, [1.0] * count)

    engine, arrivals, handles = crowded(FEW, speculation=Speculation(payoff=Always(), guesser=guess))
    lengths = []
    forward = engine._runner.forward
    engine._runner.forward = lambda step, watch: lengths.append(step.num_tokens) or forward(step, watch)
    for _ in range(12):  # up to the end of a block
        engine.step()
    arrivals.due.append(ask("Hello", "small"))
    held = [table.num_held for s in engine._scheduler.running for table in s.tables]
    engine.step()
    assert engine._interrupts.count == 1
    assert lengths[-1] > len(FEW)
    assert [table.num_held for s in engine._scheduler.running for table in s.tables] == held
    assert all(len(handle.result().token_ids) == 40 for handle in handles)


@pytest.mark.parametrize(
    ("crowd", "newcomer"),
    [
        (CROWD, ask("x", "large")),
        (CROWD, ask("x", "small", priority=1)),
        ([replace(request, tenant=str(request.token_ids)) for request in CROWD], ask("x", "small")),
        (CROWD[:8], ask("x", "small")),
    ],
    ids=["of the same tenant", "of a worse priority", "of a tenant with as many", "in a short step"],
)
def test_who_does_not_go_first_breaks_off_nothing(crowded, crowd, newcomer):
    engine, arrivals, handles = crowded(crowd)
    arrivals.due.append(newcomer)
    engine.step()
    assert arrivals.handles
    assert engine._interrupts.count == 0
    assert len(handles) == len(crowd)


def test_a_sixteenth_of_the_time_is_thrown_away_at_most():
    queue = FairQueue()
    rows = []
    for number in range(2):
        sequence = Sequence(ask("x", "large"), number, 1)
        queue.enter(sequence)
        rows.append(SimpleNamespace(sequence=sequence))
    step = SimpleNamespace(rows=rows, num_tokens=100)
    interrupts = Interrupts(queue, lambda: [Sequence(ask("x", "small"), 9, 1)])
    worked = lost = 0.0
    for _ in range(10_000):
        watch = interrupts.watch(step)
        if watch is None:
            interrupts.worked(0.01)
            worked += 0.01
            continue
        with pytest.raises(Interrupted):
            watch()
        interrupts.lost(0.009)
        lost += 0.009
    assert worked / 20 < lost <= worked / 16 + 0.009
