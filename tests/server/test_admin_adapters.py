"""/v1/admin/adapters over real, tiny models: load, ask, list, unload, and what is refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from bise.engine.fleet import Fleet
from bise.engine.model_spec import AdapterSpec, ModelSpec
from bise.model.lora import BASE_HASH
from bise.server.tuned import TunedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
real = importlib.import_module("test_fleet_models")
sys.path.pop(0)

PATH = "/v1/admin/adapters"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with the models a and b and adapters of a."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, size in (("a", real.SIZE), ("b", real.OTHER)):
        real.sized.write(folder, size).rename(folder / name)
    real.write_adapter(folder / "x", 1)
    real.write_adapter(folder / "foreign", 1, {BASE_HASH: "0" * 64})
    return folder


@pytest.fixture
def site(make_site, files, tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    named = (AdapterSpec(name="named", path=files / "x"),)
    specs = [
        ModelSpec(name="a", path=files / "a", quant="q8", threads=1, aliases=("org/a",), adapters=named),
        ModelSpec(name="b", path=files / "b", quant="q8", threads=1),
    ]
    return make_site(fleet=Fleet(specs, 1 << 30))


@pytest.fixture
def admin(site):
    return site.key(scopes=["admin", "inference"])[1]


def load(site, key, path: Path, name="x", model="a"):
    return site.post(PATH, key, json={"model": model, "name": name, "path": str(path)})


def ask(site, key, model: str):
    body = {"model": model, "prompt": "some words", "max_tokens": 12, "temperature": 0}
    return site.post("/v1/completions", key, json=body)


def listed(site, key) -> list[str]:
    return [entry["id"] for entry in site.get(PATH, key).json()["data"]]


def test_an_adapter_is_loaded_asked_for_listed_and_unloaded_while_the_server_runs(site, admin, files):
    _, user = site.key()
    plain = ask(site, user, "a").json()["choices"][0]["text"]
    made = load(site, admin, files / "x", model="org/a")
    assert made.status_code == 200, made.text
    assert made.json() == {
        "id": "a:x", "object": "adapter", "model": "a", "name": "x", "path": str(files / "x"),
        "state": "ready", "users": 0, "size_bytes": 2 * 4 * (16 * 64 + 32 * 4), "job": None, "fault": None,
    }  # fmt: skip
    tuned = ask(site, user, "a:x")
    assert tuned.json()["choices"][0]["text"] != plain
    assert ask(site, user, "org/a:x").json()["choices"] == tuned.json()["choices"]
    assert "a:x" in [entry["id"] for entry in site.get("/v1/models", user).json()["data"]]
    assert listed(site, admin) == ["a:named", "a:x"]
    gone = site.request("DELETE", f"{PATH}/org/a:x", admin)
    assert gone.json() == {"id": "a:x", "object": "adapter", "deleted": True}
    assert listed(site, admin) == ["a:named"]
    assert ask(site, user, "a:x").status_code == 404
    assert ask(site, user, "a").json()["choices"][0]["text"] == plain


def test_an_adapter_in_use_stays_until_its_request_has_ended(site, admin, files):
    load(site, admin, files / "x")
    lease = site.fleet.acquire("a:x")
    refused = site.request("DELETE", f"{PATH}/a:x", admin)
    assert (refused.status_code, refused.headers["retry-after"]) == (409, "1")
    assert refused.json()["param"] == "adapter"
    assert "a:x is in use" in refused.json()["message"]
    assert site.get(PATH, admin).json()["data"][1]["users"] == 1
    lease.release()
    assert site.request("DELETE", f"{PATH}/a:x", admin).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"name": "named"}, 409, "name", "a:named is there already"),
        ({"name": "a b"}, 400, "name", "letters, digits"),
        ({"path": "relative"}, 400, "path", "absolute"),
        ({"path": "{files}/nothing"}, 400, "path", "nothing: an adapter is a directory with"),
        ({"path": "{files}/nul\0"}, 400, "path", "an adapter is a directory with"),
        ({"path": "{files}/foreign"}, 400, "path", "was trained on a base model whose files hash to"),
        ({"model": "b"}, 400, "path", "layer that the model does not have"),
        ({"model": "none"}, 404, "model", "'none' is not served here"),
        ({"model": "a:named"}, 400, "model", "not one of its adapters"),
        ({"path": 5}, 400, "path", "path"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_by_field_and_leaves_nothing(
    site, admin, files, body, status, param, said
):
    fields = {"model": "a", "name": "x", "path": "{files}/x", **body}
    if isinstance(fields["path"], str):
        fields["path"] = fields["path"].format(files=files)
    refused = site.post(PATH, admin, json=fields)
    assert (refused.status_code, refused.json()["param"]) == (status, param), refused.text
    assert said in refused.json()["message"]
    assert "\n" not in refused.json()["message"]
    assert listed(site, admin) == ["a:named"]


def test_names_of_fine_tuning_jobs_are_theirs(site, admin, files):
    site.store.tuning.create("ann", model="a", name="hers", form="openai", spec={}, is_waiting=True)
    assert load(site, admin, files / "x", name="hers").status_code == 409
    load(site, admin, files / "x")
    site.app.service.tuned.add("a", "x", TunedModel("ann", "ftjob-1"))
    refused = site.request("DELETE", f"{PATH}/a:x", admin)
    assert refused.status_code == 409
    assert "DELETE /v1/models/a:x" in refused.json()["message"]


def test_keys_without_the_scope_admin_neither_see_nor_change_adapters(site, files):
    for scope in ("inference", "tune", "metrics"):
        _, key = site.key(scopes=[scope])
        assert site.get(PATH, key).status_code == 403
        assert load(site, key, files / "x").status_code == 403
        assert site.request("DELETE", f"{PATH}/a:named", key).status_code == 403
    assert [card.spec.name for card in site.fleet.card("a").adapters] == ["named"]
