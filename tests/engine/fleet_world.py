"""A world of fake models for tests of the fleet: loads are recorded, may fail and may be held back."""

from __future__ import annotations

import threading
from pathlib import Path

from bise.engine.fleet import Fleet
from bise.engine.model_spec import AdapterSpec, ModelPlan, ModelSpec


class FakeModel:
    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.is_open = True
        self.adapters: list[str] = []

    def load_adapter(self, name: str, path: Path) -> None:
        if path.name in self.world.failures:
            raise self.world.failures[path.name]
        assert name not in self.adapters
        self.adapters.append(name)

    def unload_adapter(self, name: str) -> None:
        self.adapters.remove(name)

    def close(self) -> None:
        assert self.is_open
        self.is_open = False
        with self.world.lock:
            self.world.alive.remove(self)
            self.world.events.append(f"-{self.name}")


def nothing() -> None:
    """What is left of a fake model needs no collection."""


class World:
    """Sizes by name; loads are recorded, may fail, and may be held back until `gate` opens."""

    def __init__(self, budget: int | None = 10, **sizes: int) -> None:
        self.sizes, self.budget = sizes, budget
        self.now = 0.0
        self.lock = threading.Lock()
        self.alive: list[FakeModel] = []
        self.events: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.faults: dict[str, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.loading = threading.Event()
        self.stages = []

    def plan(self, spec: ModelSpec, memory: int | None) -> ModelPlan:
        if spec.name in self.faults:
            raise self.faults[spec.name]
        return ModelPlan(
            size_bytes=self.sizes[spec.name],
            weight_bytes=self.sizes[spec.name],
            context=64,
            kv_format="f16",
            family="mistral",
            parameters=1,
            title="",
            licence=None,
            modified_s=0,
        )

    def load(self, spec: ModelSpec, plan: ModelPlan, progress) -> FakeModel:
        for stage, share in self.stages:
            progress(stage, share)
        self.loading.set()
        assert self.gate.wait(20)
        if spec.name in self.failures:
            raise self.failures[spec.name]
        model = FakeModel(spec.name, self)
        with self.lock:
            self.alive.append(model)
            self.events.append(f"+{spec.name}")
            used = sum(self.sizes[model.name] for model in self.alive)
            assert self.budget is None or used <= self.budget, "more is loaded than the budget holds"
        return model

    def size_adapter(self, spec: ModelSpec, path: Path) -> int:
        if path.name in self.faults:
            raise self.faults[path.name]
        return 1

    def fleet(self, idle_s=None, adapters=(), **options) -> Fleet:
        specs = [
            ModelSpec(
                name=name,
                path=Path(name),
                adapters=tuple(AdapterSpec(name=adapter, path=Path(adapter)) for adapter in adapters),
            )
            for name in self.sizes
        ]
        options["adapter_sizer"] = self.size_adapter
        options = {"wait_s": 0.0, "clock": lambda: self.now, **options}
        fleet = Fleet(
            specs, self.budget, None, planner=self.plan, loader=self.load, collect=nothing, **options
        )
        fleet._idle_s = idle_s  # no thread: `sweep` is called by the test
        return fleet


def in_thread(function, *args) -> tuple[threading.Thread, list]:
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(function(*args))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def waiting(fleet: Fleet, count: int) -> None:
    """Wait until `count` threads wait for the fleet to change."""
    while len(fleet._changed._waiters) < count:
        pass
