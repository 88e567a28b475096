"""RequestHandle: deltas in order, one end, and what happens when the consumer goes away."""

import asyncio
from functools import partial

import pytest

from bise.engine.handle import Bell, Bells, RequestHandle
from bise.engine.request import Delta, FinishReason, Request, SamplingParams, Timings, Usage
from bise.errors import EngineError

END = Delta(
    text="!",
    finish_reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=2),
    timings=Timings(queue_s=0, prefill_s=0, decode_s=0),
)


class Caller:
    """A handle whose cancellations are counted, filled with the deltas given."""

    def __init__(self, *deltas: Delta):
        self.num_cancels = 0
        self.handle = RequestHandle(7, self._cancel, None)
        for delta in deltas:
            self.handle.push(delta)

    def _cancel(self):
        self.num_cancels += 1


def test_deltas_come_in_order_and_the_end_is_not_a_cancellation():
    caller = Caller(Delta(text="a"), Delta(text="b"), END)
    assert [delta.text for delta in caller.handle] == ["a", "b", "!"]
    caller.handle.cancel()
    assert caller.num_cancels == 0


def test_iterating_again_after_the_end_gives_nothing_instead_of_waiting():
    caller = Caller(END)
    list(caller.handle)
    assert list(caller.handle) == []


def test_leaving_a_loop_cancels_at_once():
    caller = Caller(Delta(text="a"), END)
    for _ in caller.handle:
        break
    assert caller.num_cancels == 1


def test_an_exception_in_the_consumer_cancels():
    caller = Caller(Delta(text="a"), END)

    def consume():
        for _ in caller.handle:
            raise ValueError("the consumer failed")

    with pytest.raises(ValueError, match="the consumer failed"):
        consume()
    assert caller.num_cancels == 1


def test_the_result_puts_all_deltas_together():
    done = Caller(Delta(text="a", token_ids=(1,)), Delta(token_ids=(2,)), END).handle.result()
    assert (done.text, done.token_ids, done.usage.completion_tokens) == ("a!", (1, 2), 2)


def test_the_result_raises_the_error_of_the_request():
    caller = Caller(Delta(text="a"), Delta(finish_reason=FinishReason.ERROR, error=EngineError("broken")))
    with pytest.raises(EngineError, match="broken"):
        caller.handle.result()


def test_an_async_loop_receives_what_was_pushed_before_and_after_it_started():
    async def main():
        caller = Caller(Delta(text="a"))
        texts = []
        async for delta in caller.handle:
            texts.append(delta.text)
            if delta.text == "a":
                asyncio.get_running_loop().call_soon(caller.handle.push, END)
        return texts, caller.num_cancels

    assert asyncio.run(main()) == (["a", "!"], 0)


def test_pushing_to_a_closed_event_loop_cancels_instead_of_failing():
    caller = Caller()

    async def main():
        stream = aiter(caller.handle)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        return stream, task

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # the task that never ends is the point
    kept = loop.run_until_complete(main())
    loop.close()
    caller.handle.push(Delta(text="a"))
    assert caller.num_cancels == 1
    del kept


def test_a_listener_is_called_once_for_all_deltas_that_came_together():
    bells = Bells()
    handles = [RequestHandle(0, lambda: None, None, bells) for _ in range(3)]

    async def listen() -> tuple[int, list[list[str]]]:
        calls, texts = 0, [[], [], []]

        def take(index: int) -> None:
            nonlocal calls
            calls += 1
            texts[index] += [delta.text for delta in handles[index].take_ready()]

        for index, handle in enumerate(handles):
            handle.listen(partial(take, index))
        wakings = count_wakings(asyncio.get_running_loop())
        for text in "ab":
            for handle in handles:
                await asyncio.to_thread(lambda handle=handle, text=text: handle.push(Delta(text=text)))
        for handle in handles:
            handle.push(END)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return len(wakings), texts

    wakings, texts = asyncio.run(listen())
    assert texts == [["a", "b", "!"]] * 3
    assert wakings <= 7, "the three last deltas came together, and the loop was woken for each"


def count_wakings(loop: asyncio.AbstractEventLoop) -> list[object]:
    """Return a list that grows with every call of `call_soon_threadsafe` by a bell."""
    found: list[object] = []
    original = loop.call_soon_threadsafe

    def counted(callback, *args, **options):
        if isinstance(getattr(callback, "__self__", None), Bell):
            found.append(callback)
        return original(callback, *args, **options)

    loop.call_soon_threadsafe = counted
    return found


def test_a_closed_loop_cancels_the_request_of_a_listener():
    caller = Caller()

    async def listen() -> None:
        caller.handle.listen(lambda: None)

    asyncio.run(listen())
    caller.handle.push(Delta(text="a"))
    assert caller.num_cancels == 1


def test_an_engine_that_breaks_in_its_own_queue_tells_everyone_who_waits_in_it(hash_engine, monkeypatch):
    engine, _ = hash_engine(threaded=True, max_sequences=1)

    def fail(sequence):
        raise KeyError("a bug")

    monkeypatch.setattr(engine._scheduler.waiting, "turn", fail)
    with engine._wake:  # so that all are there before it looks
        handles = [
            engine.submit(Request(token_ids=(256, 65), params=SamplingParams(max_tokens=8))) for _ in range(3)
        ]
    for handle in handles:
        with pytest.raises(EngineError, match="KeyError: 'a bug'"):
            handle.result()
