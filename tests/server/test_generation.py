"""The running half of a request, without a server: what a reader gets of deltas that come as they like."""

import asyncio

from bise.engine.handle import RequestHandle
from bise.engine.request import Delta, FinishReason
from bise.server.generation import Generation

LONG = "x" * 1000
"""A hundred of these are more than may wait for a reader."""


def begun(count: int = 1) -> tuple[list[RequestHandle], list[bool], Generation]:
    """Return handles, what has been cancelled of them, and the generation that listens to them."""
    cancelled: list[bool] = []
    handles = [
        RequestHandle(seed=1, cancel=lambda: cancelled.append(True), advance=None) for _ in range(count)
    ]
    return handles, cancelled, Generation(handles)


def say(handle: RequestHandle, count: int, *, ends: bool = True) -> None:
    for _ in range(count):
        handle.push(Delta(text=LONG, token_ids=(1,)))
    if ends:
        handle.push(Delta(text="end", finish_reason=FinishReason.STOP))


def test_a_whole_answer_that_comes_faster_than_it_is_read_is_not_given_up():
    async def scenario():
        handles, cancelled, generation = begun(2)
        answer = asyncio.ensure_future(generation.collect())
        await asyncio.sleep(0)
        for handle in handles:
            await asyncio.to_thread(say, handle, 100)
        first, second = await answer
        assert first.text == second.text == LONG * 100 + "end"
        assert len(first.token_ids) == 100
        assert first.finish_reason is FinishReason.STOP
        assert not cancelled
        assert not generation.overrun

    asyncio.run(scenario())


def test_what_came_before_an_answer_was_collected_is_part_of_it():
    async def scenario():
        (handle,), cancelled, generation = begun()
        await asyncio.to_thread(say, handle, 40)
        await asyncio.sleep(0.01)
        (answer,) = await generation.collect()
        assert answer.text == LONG * 40 + "end"
        assert not cancelled

    asyncio.run(scenario())


def test_a_stream_that_nobody_reads_is_given_up_before_it_fills_the_memory():
    async def scenario():
        (handle,), cancelled, generation = begun()
        await asyncio.to_thread(say, handle, 100, ends=False)
        while not cancelled:
            await asyncio.sleep(0.001)
        assert generation.overrun

    asyncio.run(scenario())
