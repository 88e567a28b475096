"""Slots for experts on a device: who gives way, and what waits for what."""

import pytest

torch = pytest.importorskip("torch")

from bise.kernels.counts import ExpertCounts  # noqa: E402
from bise.kernels.experts import ExpertSlots  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402


class Moments:
    """A lane that does everything at once and notes the order in which it was asked to."""

    def __init__(self):
        self.log = []

    def mark(self):
        self.log.append("mark")
        return len(self.log)

    def copy(self, sources, targets, after):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        self.log.append(("copy", int(sources[0][0, 0]), after))
        return len(self.log)

    def wait(self, moment):
        self.log.append(("wait", moment))


@pytest.fixture
def make():
    """Return a function that makes slots for five experts whose matrices hold their number."""

    def slots_of(num_slots):
        held = [tuple(torch.full((2, 2), float(expert)) for _ in range(3)) for expert in range(5)]
        slots = ExpertSlots(TorchOps(), held, num_slots, ExpertCounts())
        slots._lane = Moments()
        return slots

    return slots_of


def use(slots, expert, keep=()):
    assert slots.bring(expert, keep)
    matrices = slots.take(expert)
    assert all(bool((matrix == expert).all()) for matrix in matrices)
    slots.leave(expert)


def test_the_longest_unused_expert_gives_way(make):
    slots = make(3)
    for expert in (0, 1, 2, 0):
        use(slots, expert)
    use(slots, 3)
    assert [expert in slots for expert in range(5)] == [True, False, True, True, False]


def test_an_expert_that_is_waited_for_does_not_give_way(make):
    slots = make(2)
    use(slots, 0)
    use(slots, 1)
    assert not slots.bring(2, keep=(0, 1))
    assert slots.bring(2, keep=(0,))
    assert 0 in slots
    assert 1 not in slots


def test_a_product_waits_for_its_copy_and_a_copy_for_the_last_product_of_its_slot(make):
    slots = make(1)
    use(slots, 4)
    use(slots, 2)
    assert slots._lane.log == [
        ("copy", 4, None), ("wait", 1), "mark", ("copy", 2, 3), ("wait", 4), "mark",
    ]  # fmt: skip


def test_a_guess_counts_as_right_when_its_expert_is_wanted_before_it_gives_way(make):
    slots = make(2)
    assert slots.bring(0, (0, 1), is_guess=True)
    assert slots.bring(1, (0, 1), is_guess=True)
    use(slots, 0)
    use(slots, 0)
    use(slots, 2)
    use(slots, 1)
    counts = slots._counts
    assert (counts.copied, counts.guessed, counts.guessed_right) == (4, 2, 1)
    assert counts.copied_bytes == 4 * 3 * 16
