"""Memory that runs out in the middle of a step ends that step's requests and changes nothing for others."""

import pytest

from bise.engine.engine import Engine
from bise.engine.request import Request, SamplingParams
from bise.errors import OutOfMemoryError

OPERATIONS = ("embed", "norm", "add_norm", "linear", "attend", "mlp", "gated", "logits")


class DeviceFull(RuntimeError):
    """Named as torch names it; see below."""


DeviceFull.__name__ = "OutOfMemoryError"


def request(number: int) -> Request:
    params = SamplingParams(seed=number, max_tokens=4, logprobs=1, ignore_eos=True)
    return Request(token_ids=(256, *b"a shared beginning of forty bytes, or so", number), params=params)


def bits(done):
    return (done.token_ids, done.text, done.logprobs)


@pytest.mark.parametrize(
    "error", [MemoryError(), DeviceFull("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_an_allocation_that_fails_in_any_operation_ends_one_step_and_the_next_answers_are_the_same(
    cpu_model, byte_tokenizer, monkeypatch, error
):
    transformer, ops = cpu_model("interleaved", "q4", 1)
    left = [-1]

    def failing(operation):
        def run(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise error
            return operation(*arguments)

        return run

    for name in OPERATIONS:
        monkeypatch.setattr(type(ops), name, failing(getattr(type(ops), name)))

    def make() -> Engine:
        return Engine(
            transformer, ops, config=transformer.config, tokenizer=byte_tokenizer, kv_format="q8",
            num_blocks=40, threaded=False, max_step_tokens=32,
        )  # fmt: skip

    quiet = make()
    expected = [bits(quiet.submit(request(number)).result()) for number in range(3)]
    engine = make()
    num_failed = 0
    for site in range(1, 500):
        left[0] = site
        handles = [engine.submit(request(number)) for number in range(3)]
        for handle, answer in zip(handles, expected, strict=True):
            try:
                assert bits(handle.result()) == answer
            except OutOfMemoryError:
                num_failed += 1
        if left[0] > 0:
            break  # the work has no more sites
        left[0] = -1
        assert bits(engine.submit(request(0)).result()) == expected[0]
        assert engine.stats().num_running == engine.stats().num_waiting == 0
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert site > 30
    assert num_failed >= site - 1
