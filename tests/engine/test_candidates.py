"""Tokens that a device chose are those that the processor would have chosen, and only its rows are asked."""

import numpy as np
import pytest

from bise.engine.grammar import GrammarSpec
from bise.engine.request import Request, SamplingParams
from bise.engine.sampling import largest, pick, truncate
from bise.engine.speculation import Speculation
from bise.errors import EngineError, NonFiniteError
from bise.grammar.follower import Follower
from bise.grammar.tools import tool_calls_spec
from bise.text.messages import ToolSpec
from bise.text.tool_calls import CallForm

PLAIN = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1, "top_k": 30, "top_p": 0.9},
]
FOR_THE_PROCESSOR = [
    {"logprobs": 2},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5},
    {"logit_bias": {65: 3.0}},
    {"min_tokens": 3},
]


class Device:
    """A device that chooses by the processor's own functions, and is unsure now and then."""

    def __init__(self, unsure=0.0):
        self.rows = self.masked = 0
        self._rng = np.random.default_rng(0)
        self._unsure = unsure

    def __call__(self, logits, parameters, mask):
        tokens, status = np.zeros((2, len(logits)), np.int32)
        self.rows += len(logits)
        for index, (row, (temperature, top_k, top_p, min_p, share)) in enumerate(
            zip(logits, parameters, strict=True)
        ):
            allowed = np.arange(row.size)
            if mask is not None:
                bits = np.unpackbits(mask[index].view(np.uint8), bitorder="little")[: row.size]
                self.masked += not bits.all()
                allowed = np.flatnonzero(bits)
            scores = row[allowed].astype(np.float64)
            if not np.isfinite(row).all() or self._rng.random() < self._unsure:
                status[index] = 1
                tokens[index] = -5  # must not be looked at
            elif temperature == 0:
                tokens[index] = allowed[largest(scores, 1)[0]]
            else:
                params = SamplingParams(temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
                ids, weights = truncate(scores, params)
                place = pick(np.cumsum(weights), share)
                tokens[index] = allowed[place if ids is None else ids[place]]
        return tokens, status


def ask(index=0, grammar=None, **params):
    wanted = {"max_tokens": 12, "seed": 40 + index, **params}
    return Request(token_ids=(256, 65 + index), params=SamplingParams(**wanted), grammar=grammar)


@pytest.fixture
def run(hash_engine):
    """Return a function that runs requests together, on a device that chooses where one is given."""

    def all_of(requests, device=None, **options):
        engine, _ = hash_engine(sample=device, **options)
        handles = [engine.submit(request) for request in requests]
        return [handle.result() for handle in handles]

    return all_of


@pytest.mark.parametrize("unsure", [0.0, 0.5])
def test_a_device_chooses_the_tokens_that_the_processor_chooses(run, unsure):
    requests = [ask(index, **params) for index, params in enumerate(PLAIN + FOR_THE_PROCESSOR)]
    device = Device(unsure)
    got, want = run(requests, device), run(requests)
    assert [done.token_ids for done in got] == [done.token_ids for done in want]
    assert [done.logprobs for done in got] == [done.logprobs for done in want]
    assert device.rows == sum(len(done.token_ids) for done in want[: len(PLAIN)])


def test_a_grammar_reaches_the_device_as_a_mask(run):
    requests = [ask(index, GrammarSpec.regex("[0-9]{5,9}"), temperature=0.8) for index in range(2)] + [ask(2)]
    device = Device()
    got, want = run(requests, device), run(requests)
    assert [(done.token_ids, done.text) for done in got] == [(done.token_ids, done.text) for done in want]
    assert device.masked >= 10


def test_before_its_trigger_a_grammar_leaves_the_choice_to_a_device_without_masks(run, byte_tokenizer):
    class Calling(type(byte_tokenizer)):
        stop_ids = frozenset()  # 257 begins a call

        def control_id(self, name):
            return 257 if name == "[TOOL_CALLS]" else None

    tools = [ToolSpec(name="look", description="", parameters={"type": "object", "properties": {}})]
    grammar = tool_calls_spec(CallForm.LIST, tools, parallel=False)
    requests = [
        ask(0, grammar, temperature=0, max_tokens=60),
        ask(1, grammar, temperature=0.8, max_tokens=60),
    ]
    script = {**{byte: byte + 1 for byte in range(65, 70)}, 70: 257}
    options = {"script": script, "tokenizer": Calling()}
    device = Device()
    got, want = run(requests, device, takes_masks=False, **options), run(requests, **options)
    assert [(done.token_ids, done.text) for done in got] == [(done.token_ids, done.text) for done in want]
    assert all(257 in done.token_ids for done in want)
    assert device.rows == sum(done.token_ids.index(257) + 1 for done in want)
    assert device.masked == 0


def test_a_grammar_that_fails_ends_its_own_request_alone_on_a_device_too(hash_engine, monkeypatch):
    engine, _ = hash_engine(sample=Device())
    good, bad = engine.submit(ask(0)), engine.submit(ask(1, GrammarSpec.regex("[0-9]{5,9}")))

    def fail(follower, left):
        raise EngineError("no way out")

    monkeypatch.setattr(Follower, "allowed", fail)
    assert len(good.result().token_ids) == 12
    with pytest.raises(EngineError, match="no way out"):
        bad.result()


def test_guesses_are_checked_with_the_tokens_of_the_device(run):
    requests = [
        Request(
            token_ids=(256, *b"abcabcabc"), params=SamplingParams(max_tokens=40, temperature=0.2, seed=seed)
        )
        for seed in range(3)
    ]
    device = Device()
    got = run(requests, device, speculation=Speculation())
    want = run(requests)
    assert [done.token_ids for done in got] == [done.token_ids for done in want]


def test_broken_logits_end_their_request_on_a_device_too(run):
    with pytest.raises(NonFiniteError):
        run([ask(0)], Device(), broken=[65])


def test_a_model_split_between_ram_and_a_gpu_chooses_where_its_logits_are():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from bise.engine.candidates import Chooses
    from bise.kernels.cpu import CpuOps
    from bise.kernels.split import ChoosingSplitOps, SplitOps
    from bise.kernels.torch import TorchOps
    from bise.kernels.triton.ops import TritonOps

    device = TritonOps(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    ops = ChoosingSplitOps(CpuOps(1), device, 1)
    assert isinstance(ops, Chooses)
    assert not isinstance(SplitOps(CpuOps(1), TorchOps(), 1), Chooses)
    logits = torch.tensor([[0.0, 3.0, 1.0]], device=device.device)
    tokens, status = ops.sample(logits, np.array([[0.0, 0, 1.0, 0.0, 0.0]]), None)
    assert (tokens.tolist(), status.tolist()) == ([1], [0])


def test_a_processor_chooses_natively_the_tokens_that_the_sampler_chooses(run):
    from bise.kernels.cpu import CpuOps

    requests = [ask(index, **params) for index, params in enumerate(PLAIN + FOR_THE_PROCESSOR)]
    requests.append(ask(20, GrammarSpec.regex("[0-9]{5,9}"), temperature=0.8))
    native, asked = CpuOps(1), []

    def sample(logits, parameters, mask):
        asked.append(len(logits))
        return native.sample(logits, parameters, mask)

    got, want = run(requests, sample, takes_masks=False), run(requests)
    assert [(done.token_ids, done.logprobs) for done in got] == [
        (done.token_ids, done.logprobs) for done in want
    ]
    assert sum(asked) == sum(len(done.token_ids) for done in want[: len(PLAIN)])
