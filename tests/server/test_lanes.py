import asyncio

import pytest

from bise.server import lanes as lanes_module
from bise.server.lanes import GIVES_WAY_S, MANY, WIDTH, Lanes


class Machine:
    """A clock that moves when somebody sleeps, and the open requests of each key."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.slept = []
        self.num_open = {}
        self._sleep = asyncio.sleep
        monkeypatch.setattr(lanes_module.asyncio, "sleep", self.sleep)
        self.lanes = Lanes(lambda key: self.num_open.get(key, 0), lambda: self.now)

    async def sleep(self, seconds):
        if seconds:
            self.slept.append(seconds)
            self.now += seconds
        await self._sleep(0)

    async def let_in(self, key):
        async with self.lanes.place(key):
            self.num_open[key] = self.num_open.get(key, 0) + 1


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_a_key_with_many_open_requests_gives_way_to_one_with_few(machine):
    async def main():
        machine.num_open["large"] = MANY
        await machine.let_in("large")
        assert machine.slept == []  # nobody else is there
        await machine.let_in("small")
        assert machine.slept == []  # with few of its own it waits for nobody
        machine.now += GIVES_WAY_S / 4
        await machine.let_in("large")
        assert machine.slept == [pytest.approx(GIVES_WAY_S * 3 / 4)]
        await machine.let_in("large")
        assert len(machine.slept) == 1  # its time is over

    asyncio.run(main())


def test_a_key_with_many_requests_goes_on_beside_others_that_never_end(machine):
    async def main():
        machine.num_open["large"] = MANY
        for _ in range(20):
            machine.num_open["small"] = 0
            await machine.let_in("small")
            await machine.let_in("large")
        assert max(machine.slept) == pytest.approx(GIVES_WAY_S)
        assert machine.num_open["large"] == MANY + 20

    asyncio.run(main())


def test_few_of_a_key_are_let_in_at_a_time_in_the_order_of_arrival(machine):
    async def main():
        inside, most, order, go_on = 0, 0, [], asyncio.Event()

        async def one(place):
            nonlocal inside, most
            async with machine.lanes.place("large"):
                inside += 1
                most = max(most, inside)
                order.append(place)
                await go_on.wait()
                inside -= 1

        crowd = [asyncio.ensure_future(one(place)) for place in range(10 * WIDTH)]
        await machine.sleep(0)
        await machine.sleep(0)
        await machine.let_in("small")  # does not stand behind any of them
        go_on.set()
        await asyncio.gather(*crowd)
        assert most == WIDTH
        assert order == sorted(order)

    asyncio.run(main())


def test_a_request_that_is_given_up_leaves_its_place_to_the_next(machine):
    async def main():
        go_on = asyncio.Event()

        async def hold():
            async with machine.lanes.place("key"):
                await go_on.wait()

        crowd = [asyncio.ensure_future(hold()) for _ in range(3 * WIDTH)]
        await machine.sleep(0)
        await machine.sleep(0)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        await asyncio.wait_for(machine.let_in("key"), 10)

    asyncio.run(main())
