import asyncio

from hypothesis import given
from hypothesis import strategies as st

from bise.server.edge import Edge, Reach
from bise.server.limits import HttpLimits
from bise.server.turns import Turns


def _begun(callers, cancelled=()):
    """Return who began in which order, all having come together; `cancelled` are places that left at once."""

    async def main():
        turns, begun = Turns(), []

        async def begin(place, caller):
            await turns.take(caller)
            begun.append((place, caller))

        tasks = [asyncio.ensure_future(begin(place, caller)) for place, caller in enumerate(callers)]
        await asyncio.sleep(0)
        for place in cancelled:
            tasks[place].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert turns.num_waiting == 0
        return begun

    return asyncio.run(main())


@given(st.lists(st.sampled_from("abc"), max_size=30), st.data())
def test_everybody_begins_once_in_the_order_in_which_they_came(callers, data):
    places = st.integers(0, max(0, len(callers) - 1))
    left = data.draw(st.sets(places, max_size=5)) if callers else set()
    begun = _begun(callers, left)
    assert {place for place, _ in begun} >= set(range(len(callers))) - left
    assert len(begun) == len(set(begun))
    for caller in "abc":
        own = [place for place, who in begun if who == caller]
        assert own == sorted(own)


@given(st.integers(1, 200), st.integers(1, 3))
def test_who_comes_after_a_crowd_waits_for_one_of_them_and_not_for_all(crowd, others):
    begun = [caller for _, caller in _begun(["crowd"] * crowd + [f"other {n}" for n in range(others)])]
    last = max(begun.index(f"other {n}") for n in range(others))
    assert last <= 2 + others


def test_one_request_begins_in_each_round_of_the_event_loop():
    async def main():
        turns, rounds, begun = Turns(), 0, []

        async def begin():
            await turns.take("crowd")
            begun.append(rounds)

        tasks = [asyncio.ensure_future(begin()) for _ in range(20)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            rounds += 1
        return [begun.count(number) for number in set(begun)]

    assert max(asyncio.run(main())) <= 1


def test_a_key_with_many_requests_does_not_stand_before_another_key_at_the_edge():
    order = []

    async def app(scope, receive, send):
        order.append(dict(scope["headers"])[b"authorization"])

    async def main():
        edge = Edge(app, limits=HttpLimits(), reach=Reach(), is_draining=lambda: False)
        keys = [b"Bearer large"] * 100 + [b"Bearer small"]
        calls = [
            edge({"type": "http", "method": "GET", "path": "/v1/models", "client": ("127.0.0.1", 1),
                  "headers": [(b"host", b"localhost"), (b"authorization", key)]}, None, None)
            for key in keys
        ]  # fmt: skip
        await asyncio.gather(*calls)

    asyncio.run(main())
    assert len(order) == 101
    assert order.index(b"Bearer small") <= 2
