"""Fleet: budget, eviction, shared loads, idle models, over fake models."""

import importlib
import platform
import random
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.engine.fleet import Fleet
from bise.engine.fleet_entry import give_memory_back
from bise.engine.model_spec import ModelPlan, ModelSpec
from bise.errors import (
    ConfigError,
    ConflictError,
    EngineError,
    MemoryPlanError,
    ModelBusyError,
    ModelFileError,
    ModelNotFoundError,
)

sys.path.insert(0, str(Path(__file__).parent))
fleet_world = importlib.import_module("fleet_world")
sys.path.pop(0)
World, in_thread, waiting = fleet_world.World, fleet_world.in_thread, fleet_world.waiting


def test_nothing_is_loaded_before_its_first_use():
    world = World(a=4, b=4)
    with world.fleet() as fleet:
        assert world.events == []
        assert [(card.spec.name, card.state) for card in fleet.cards()] == [("a", "cold"), ("b", "cold")]
        with fleet.use("a") as model:
            assert model.name == "a"
            assert fleet.card("a").users == 1
        assert fleet.card("a").state == "ready"
        assert fleet.used_bytes == 4


def test_a_loaded_model_is_used_again_without_a_load():
    world = World(a=4)
    with world.fleet() as fleet:
        for _ in range(3):
            with fleet.use("a"):
                pass
        assert world.events == ["+a"]


def test_the_least_recently_used_model_makes_room():
    world = World(a=4, b=4, c=4)
    with world.fleet() as fleet:
        for name in ("a", "b", "a", "c"):
            world.now += 1
            with fleet.use(name):
                pass
        assert world.events == ["+a", "+b", "-b", "+c"]


def test_a_small_model_stays_when_a_large_one_alone_makes_the_room():
    world = World(small=1, large=8, new=5)
    with world.fleet() as fleet:
        for name in ("small", "large", "new"):
            world.now += 1
            with fleet.use(name):
                pass
        assert world.events == ["+small", "+large", "-large", "+new"]


def test_a_model_in_use_is_never_unloaded_and_the_newcomer_is_told_it_must_wait():
    world = World(a=6, b=6)
    with world.fleet() as fleet, fleet.use("a") as model:
        with pytest.raises(ModelBusyError, match="b waits for memory"), fleet.use("b"):
            pass
        with pytest.raises(ModelBusyError, match="a has 1 user"):
            fleet.sleep("a")
        assert model.is_open
        assert fleet.card("b").state == "cold"


def test_who_waits_gets_the_room_when_the_running_model_ends():
    world = World(a=6, b=6)
    with world.fleet(wait_s=1e6) as fleet:
        lease = fleet.acquire("a")
        thread, outcome = in_thread(fleet.acquire, "b")
        waiting(fleet, 1)
        assert world.events == ["+a"]
        lease.release()
        thread.join(20)
        assert outcome[0].loaded.name == "b"
        assert world.events == ["+a", "-a", "+b"]


def test_only_a_model_that_is_loaded_is_had_at_once_and_then_it_stays():
    world = World(a=6, b=6)
    with world.fleet() as fleet:
        assert fleet.acquire_loaded("a") is None
        fleet.wake("a")
        lease = fleet.acquire_loaded("a")
        with pytest.raises(ModelBusyError, match="b waits for memory"), fleet.use("b"):
            pass
        lease.release()
        with fleet.use("b"):
            assert fleet.acquire_loaded("a") is None
        with pytest.raises(ModelNotFoundError):
            fleet.acquire_loaded("c")
    assert fleet.acquire_loaded("b") is None


def test_nobody_overtakes_the_first_who_waits_for_room():
    world = World(a=6, big=8, small=3)
    with world.fleet(wait_s=1e6) as fleet:
        lease = fleet.acquire("a")
        first, _ = in_thread(fleet.wake, "big")
        waiting(fleet, 1)
        second, _ = in_thread(fleet.wake, "small")
        waiting(fleet, 2)
        lease.release()
        first.join(20)
        second.join(20)
        assert world.events == ["+a", "-a", "+big", "-big", "+small"]


def test_a_model_larger_than_the_budget_is_refused_before_anyone_is_unloaded():
    world = World(a=4, giant=11)
    with world.fleet() as fleet:
        fleet.wake("a")
        with pytest.raises(MemoryPlanError, match="giant needs"), fleet.use("giant"):
            pass
        assert world.events == ["+a"]
        assert "giant needs" in fleet.card("giant").fault


def test_callers_of_one_cold_model_share_one_load():
    world = World(a=4)
    world.gate.clear()
    with world.fleet() as fleet:
        calls = [in_thread(fleet.acquire, "a") for _ in range(5)]
        waiting(fleet, 4)
        world.gate.set()
        for thread, _ in calls:
            thread.join(20)
        assert len({id(outcome[0].loaded) for _, outcome in calls}) == 1
        assert world.events == ["+a"]
        assert fleet.card("a").users == 5


def test_a_card_tells_how_much_of_a_model_is_loaded():
    world = World(10, a=4)
    world.gate.clear()
    with world.fleet() as fleet:
        assert fleet.card("a").loaded is None
        for stages, share in (
            ([("reading weights", 0.25)], 0.25),
            ([("hashing the files", 1.0), ("packing weights", 0.5)], 0.6),
            ([("packing weights", 0.7), ("reading weights", 0.1)], 0.7),
        ):
            world.stages = stages
            world.loading.clear()
            world.gate.clear()
            thread, _ = in_thread(fleet.wake, "a")
            assert world.loading.wait(20)
            assert fleet.card("a").loaded == pytest.approx(share)
            world.gate.set()
            thread.join(20)
            assert fleet.card("a").loaded is None
            fleet.sleep("a")


def test_a_failed_load_fails_those_who_waited_for_it_and_nobody_after_them():
    world = World(a=4)
    world.gate.clear()
    world.failures["a"] = OSError("disk gone")
    with world.fleet() as fleet:
        calls = [in_thread(fleet.acquire, "a") for _ in range(3)]
        waiting(fleet, 2)
        world.gate.set()
        for thread, outcome in calls:
            thread.join(20)
            assert isinstance(outcome[0], EngineError)
            assert "disk gone" in str(outcome[0])
        assert fleet.used_bytes == 0
        del world.failures["a"]
        with fleet.use("a") as model:
            assert model.is_open


def test_two_models_load_at_the_same_time_when_both_fit():
    world = World(a=4, b=4)
    world.gate.clear()
    with world.fleet() as fleet:
        first, _ = in_thread(fleet.wake, "a")
        world.loading.wait(20)
        world.loading.clear()
        second, _ = in_thread(fleet.wake, "b")
        assert world.loading.wait(20)
        world.gate.set()
        first.join(20)
        second.join(20)
        assert sorted(world.events) == ["+a", "+b"]


def test_a_file_mended_after_the_start_is_found_at_the_next_use():
    world = World(a=4)
    world.faults["a"] = ModelFileError("a: torn")
    with world.fleet() as fleet:
        assert (fleet.card("a").plan, fleet.card("a").fault) == (None, "a: torn")
        with pytest.raises(ModelFileError, match="torn"), fleet.use("a"):
            pass
        world.faults.clear()
        with fleet.use("a"):
            assert fleet.card("a").fault is None


def test_an_idle_model_is_unloaded_and_a_running_one_is_not():
    world = World(a=4, b=4)
    with world.fleet(idle_s=60) as fleet:
        fleet.wake("a")
        with fleet.use("b"):
            world.now = 59
            assert fleet.sweep() == 1
            world.now = 60
            assert fleet.sweep() is None
            assert world.events == ["+a", "+b", "-a"]
        assert fleet.sweep() == 60


def test_the_reaper_unloads_by_itself():
    world = World(a=4)
    closed = threading.Event()
    with Fleet(
        [ModelSpec(name="a", path=Path("a"))],
        10,
        0.0,
        planner=world.plan,
        loader=world.load,
        collect=fleet_world.nothing,
    ) as fleet:
        with fleet.use("a") as model:
            model.close, close = lambda: (close(), closed.set()), model.close
        assert closed.wait(20)


def test_a_model_that_becomes_idle_while_another_one_is_unloaded_is_unloaded_too():
    world = World(a=4, b=4)
    specs = [ModelSpec(name=name, path=Path(name)) for name in "ab"]
    closed = threading.Event()
    options = {"planner": world.plan, "loader": world.load, "collect": fleet_world.nothing}
    with Fleet(specs, 10, 0.0, **options) as fleet:
        lease = fleet.acquire("b")
        lease.loaded.close, close_b = lambda: (close_b(), closed.set()), lease.loaded.close
        with fleet.use("a") as model:
            model.close, close_a = lambda: (lease.release(), close_a()), model.close
        assert closed.wait(20)


def test_sleep_gives_the_memory_back_and_wake_takes_it_again():
    world = World(a=4)
    with world.fleet() as fleet:
        fleet.sleep("a")
        fleet.wake("a")
        fleet.sleep("a")
        assert (fleet.used_bytes, fleet.card("a").state) == (0, "cold")
        fleet.wake("a")
        assert world.events == ["+a", "-a", "+a"]


def test_closing_waits_for_users_only_when_it_drains():
    world = World(a=4, b=4)
    fleet = world.fleet()
    lease = fleet.acquire("a")
    thread, _ = in_thread(lambda: fleet.close(drain=True))
    waiting(fleet, 1)
    with pytest.raises(EngineError, match="closed"), fleet.use("b"):
        pass
    assert world.events == ["+a"]
    lease.release()
    lease.release()
    thread.join(20)
    assert world.events == ["+a", "-a"]
    hasty = world.fleet()
    hasty.acquire("b")
    hasty.close()
    assert world.events == ["+a", "-a", "+b", "-b"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_memory_of_many_small_pieces_goes_back_to_the_system():
    def resident_mib():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    pieces = [bytes(10_000) for _ in range(10_000)]
    last = bytes(10_000)  # the heap ends with it
    full = resident_mib()
    del pieces
    give_memory_back()
    assert resident_mib() < full - 60
    assert last


def test_an_alias_means_the_model_and_an_unknown_name_lists_what_is_served():
    world = World(a=4)
    specs = [ModelSpec(name="a", path=Path("a"), aliases=("gpt-4",))]
    with Fleet(specs, 10, planner=world.plan, loader=world.load, collect=fleet_world.nothing) as fleet:
        with fleet.use("gpt-4") as model:
            assert model.name == "a"
        with pytest.raises(ModelNotFoundError, match="'b' is not served here; served: a") as caught:
            fleet.card("b")
        assert caught.value.field == "model"


@pytest.mark.parametrize("names", [("a", "a"), ("a:b",), ("",)])
def test_names_that_clash_or_cannot_be_asked_for_are_refused(names):
    with pytest.raises(ConfigError, match=r"name|called"):
        Fleet([ModelSpec(name=name, path=Path("x")) for name in names], 1)


def test_two_adapters_of_one_name_are_refused_and_neither_is_dropped():
    with pytest.raises(ConfigError, match="a has two adapters called 'x'; rename one"):
        World(a=4).fleet(adapters=("x", "y", "x"))


def test_an_adapter_is_loaded_with_its_first_use_and_told_in_the_lease():
    world = World(a=4)
    with world.fleet(adapters=("x", "y")) as fleet:
        lease = fleet.acquire("a:x")
        assert (lease.adapter, lease.loaded.adapters) == ("x", ["x"])
        again = fleet.acquire("a:x")
        plain = fleet.acquire("a")
        assert (plain.adapter, plain.loaded.adapters) == (None, ["x"])
        assert [(card.spec.name, card.is_loaded) for card in fleet.card("a").adapters] == [
            ("x", True),
            ("y", False),
        ]
        assert fleet.card("a").users == 3
        for held in (lease, again, plain):
            held.release()
        fleet.sleep("a")
        assert not any(card.is_loaded for card in fleet.card("a").adapters)
        with fleet.use("a:x") as model:
            assert model.adapters == ["x"]


def test_adapters_count_against_the_budget():
    world = World(6, a=4, b=2)
    with world.fleet(adapters=()) as fleet:
        fleet.wake("b")
        with fleet.use("a"):
            fleet.add_adapter("a", "x", Path("x"))
            assert (fleet.used_bytes, world.events) == (5, ["+b", "+a", "-b"])
            fleet.add_adapter("a", "y", Path("y"))
            with pytest.raises(MemoryPlanError, match="adapters included"):
                fleet.add_adapter("a", "z", Path("z"))
        fleet.remove_adapter("a", "y")
        fleet.remove_adapter("a", "x")
        assert fleet.used_bytes == 4
    crowded = World(6, a=4, b=2)
    with crowded.fleet() as fleet:
        fleet.acquire("a")
        fleet.acquire("b")
        with pytest.raises(ModelBusyError, match="no room for a:x"):
            fleet.add_adapter("a", "x", Path("x"))


def test_an_adapter_in_use_is_not_removed_and_a_removed_one_is_not_found():
    world = World(a=4)
    with world.fleet(adapters=("x",)) as fleet:
        with fleet.use("a:x") as model, pytest.raises(ModelBusyError, match="a:x is in use"):
            fleet.remove_adapter("a", "x")
        fleet.remove_adapter("a", "x")
        assert model.adapters == []
        with pytest.raises(ModelNotFoundError, match="a has no adapter 'x'; it has: none"), fleet.use("a:x"):
            pass
        fleet.add_adapter("a", "x", Path("other"))
        with pytest.raises(ConflictError, match="a:x is there already"):
            fleet.add_adapter("a", "x", Path("other"))


def test_an_adapter_that_two_remove_at_once_is_not_found_by_the_second():
    world = World(a=4)
    with world.fleet(adapters=("x",)) as fleet:
        with fleet._entries["a"].attaching:  # both have looked for it before either takes it away
            runs = [in_thread(fleet.remove_adapter, "a", "x") for _ in range(2)]
        outcomes = [(thread.join(), outcome[0])[1] for thread, outcome in runs]
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ModelNotFoundError", "NoneType"]


def test_an_adapter_that_is_wanted_at_once_is_loaded_with_its_model_or_was_never_there():
    world = World(a=4)
    world.failures["bad"] = ModelFileError("bad: NaN")
    with world.fleet() as fleet:
        fleet.add_adapter("a", "x", Path("x"), at_once=True)
        assert [(card.is_loaded, card.users) for card in fleet.card("a").adapters] == [(True, 0)]
        with pytest.raises(ModelFileError, match="NaN"):
            fleet.add_adapter("a", "bad", Path("bad"), at_once=True)
        assert [card.spec.name for card in fleet.card("a").adapters] == ["x"]
        assert (fleet.card("a").users, fleet.used_bytes) == (0, 5)
        with fleet.use("a:x") as model:
            assert (model.adapters, fleet.card("a").adapters[0].users) == (["x"], 1)


def test_a_bad_adapter_fails_its_own_callers_and_leaves_nothing_pinned(caplog):
    world = World(a=4)
    world.faults["torn"] = ModelFileError("torn: cut short")
    world.failures["bad"] = ModelFileError("bad: NaN")
    with world.fleet(adapters=("torn", "bad")) as fleet:
        for name in ("torn", "bad"):
            with pytest.raises(ModelFileError, match=name), fleet.use(f"a:{name}"):
                pass
        assert [card.fault for card in fleet.card("a").adapters] == ["torn: cut short", None]
        assert fleet.card("a").users == 0
        assert "torn: cut short" in caplog.text  # callers over HTTP hear only that the log knows
        assert "bad: NaN" in caplog.text
        with fleet.use("a") as model:
            assert model.is_open


class Sharing(World):
    def plan(self, spec, memory):
        plan = super().plan(spec, memory)
        kv = (memory - plan.weight_bytes) // 2 if spec.context is None else spec.context
        fields = {name: getattr(plan, name) for name in ModelPlan.__slots__}
        return ModelPlan(**{**fields, "size_bytes": plan.weight_bytes + kv})


def test_models_without_a_context_are_planned_to_fit_side_by_side_where_they_can():
    with Sharing(100, a=20, b=20, c=20).fleet() as fleet:
        assert [card.plan.size_bytes for card in fleet.cards()] == [26, 26, 26]
    with Sharing(100, a=60, b=60).fleet() as fleet:  # not even the weights fit together
        assert [card.plan.size_bytes for card in fleet.cards()] == [80, 80]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    moves=st.lists(st.tuples(st.integers(0, 4), st.sampled_from("aarrsfw"), st.integers(0, 3)), max_size=60),
)
def test_any_order_of_uses_keeps_the_budget_and_the_running_models(sizes, moves):
    world = World(8, **{f"m{index}": size for index, size in enumerate(sizes)})
    fleet = world.fleet(idle_s=5)
    leases = []
    for index, move, step in moves:
        name = f"m{index % len(sizes)}"
        world.now += step
        if move == "a":
            try:
                leases.append((name, fleet.acquire(name)))
            except ModelBusyError:
                held = sum(world.sizes[other] for other in {other for other, _ in leases})
                assert held + world.sizes[name] > 8, "refused although the idle ones would have made room"
        elif move == "r" and leases:
            leases.pop(step % len(leases))[1].release()
        elif move == "s":
            fleet.sweep()
        elif move == "f":
            world.failures = {name: OSError()} if step else {}
            in_use = any(other == name for other, _ in leases)
            if step and not in_use:
                try:
                    fleet.sleep(name)
                    with pytest.raises((EngineError, ModelBusyError)):
                        fleet.wake(name)
                finally:
                    world.failures = {}
            world.failures = {}
        elif not any(other == name for other, _ in leases):
            fleet.sleep(name)
        assert all(lease.loaded.is_open for _, lease in leases)
        assert fleet.used_bytes == sum(world.sizes[model.name] for model in world.alive) <= 8
    for _, lease in leases:
        lease.release()
    fleet.close()
    assert not world.alive


def test_many_threads_at_once_keep_the_budget_and_all_get_served():
    world = World(a=4, b=4, c=5, d=9)
    fleet = world.fleet(wait_s=1e6)

    def work(seed: int) -> int:
        rng = random.Random(seed)
        for _ in range(40):
            with fleet.use(rng.choice("abcd")) as model:
                assert model.is_open
        return 40

    calls = [in_thread(work, seed) for seed in range(6)]
    for thread, _ in calls:
        thread.join(60)
    assert [outcome for _, outcome in calls] == [[40]] * 6
    fleet.close()
    assert not world.alive
