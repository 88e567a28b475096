"""Adapters over HTTP: listed beside their model, and asked for as MODEL:NAME."""

from __future__ import annotations

import gc
import importlib
import sys
import time
import weakref
from pathlib import Path

import httpx
import pytest

from bise.engine.fleet import Fleet
from bise.engine.model_spec import AdapterSpec, ModelSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
real = importlib.import_module("test_fleet_models")
sys.path.pop(0)


@pytest.fixture
def live(tmp_path, serve):
    adapters = (
        AdapterSpec(name="x", path=real.write_adapter(tmp_path / "x", 1)),
        AdapterSpec(name="gone", path=tmp_path / "gone"),
    )
    base = real.sized.write(tmp_path, real.SIZE)
    return serve(Fleet([ModelSpec(name="a", path=base, quant="q8", threads=1, adapters=adapters)], 1 << 30))


def complete(live, model: str, **fields) -> httpx.Response:
    body = {"model": model, "prompt": "some words", "max_tokens": 12, "temperature": 0, **fields}
    return httpx.post(f"{live.url}/v1/completions", json=body)


def test_an_adapter_is_listed_under_its_model(live):
    listed = {entry["id"]: entry for entry in httpx.get(f"{live.url}/v1/models").json()["data"]}
    assert list(listed) == ["a", "a:x", "a:gone"]
    assert (listed["a:x"]["root"], listed["a:x"]["type"]) == ("a", "fine-tuned")
    assert "unavailable" not in listed["a:x"]
    assert listed["a:gone"]["unavailable"]
    assert httpx.get(f"{live.url}/v1/models/a:x").json()["id"] == "a:x"
    assert httpx.get(f"{live.url}/v1/models/a:none").status_code == 404


def test_a_request_for_model_and_adapter_goes_through_the_adapter(live):
    plain, tuned = complete(live, "a"), complete(live, "a:x")
    assert (plain.status_code, tuned.status_code) == (200, 200)
    assert plain.json()["choices"][0]["text"] != tuned.json()["choices"][0]["text"]
    assert tuned.json()["model"] == "a:x"
    assert complete(live, "a:none").status_code == 404
    assert complete(live, "a:gone").status_code == 503
    assert complete(live, "a").json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("model", ["a", "a:x"])
def test_a_model_that_answered_leaves_memory_when_it_is_unloaded(live, model):
    assert complete(live, model).status_code == 200
    lease = live.fleet.acquire("a")
    loaded = weakref.ref(lease.loaded)
    lease.release()
    del lease
    live.fleet.sleep("a", wait_s=20)
    until = time.monotonic() + 20
    while loaded() is not None:  # the last request lets go of it a moment after its answer
        gc.collect()
        assert time.monotonic() < until, "the server keeps an unloaded model: its budget counts it as free"
    assert complete(live, model).status_code == 200


def test_a_receipt_names_the_adapter_by_its_content(live):
    def adapter(model):
        return complete(live, model, receipt=True).json()["choices"][0]["receipt"]["adapter"]

    lease = live.fleet.acquire("a:x")
    assert adapter("a:x") == {"name": "x", "sha256": lease.loaded.engine.adapters.find("x").sha256}
    assert adapter("a") is None
    lease.release()
