"""/v1/responses over a database: they outlive the process and belong to the key that made them."""

from __future__ import annotations

import pytest


def ask(site, key=None, **fields):
    return site.post("/v1/responses", key, json={"model": "stub", "input": "My name is Ann.", **fields})


def said(site):
    return bytes(token for token in site.engine.requests[-1].token_ids if token < 256).decode()


def test_a_response_outlives_the_server_and_can_be_continued_by_the_next(make_site, tmp_path):
    url = str(tmp_path / "shared.db")
    first = make_site(url=url)
    made = ask(first).json()
    (tmp_path / "site1").mkdir()  # the second server has the same secret
    (tmp_path / "site1" / "secret").write_bytes((tmp_path / "site0" / "secret").read_bytes())
    (tmp_path / "site1" / "secret").chmod(0o600)
    second = make_site(url=url)
    assert second.get(f"/v1/responses/{made['id']}").json() == made
    ask(second, input="Who am I?", previous_response_id=made["id"])
    assert "My name is Ann." in said(second)
    assert "Hello, world!" in said(second)


def test_a_response_belongs_to_its_key_alone(site):
    _, mine = site.key("mine", owner="team")
    _, other = site.key("other", owner="team")
    _, admin = site.key("admin", scopes=["inference", "admin"])
    path = f"/v1/responses/{ask(site, mine).json()['id']}"
    for key in (other, admin):
        assert site.get(path, key).status_code == 404
        assert site.get(f"{path}/input_items", key).status_code == 404
        assert site.request("DELETE", path, key).status_code == 404
        assert site.post(f"{path}/cancel", key).status_code == 404
        refused = ask(site, key, previous_response_id=path.rpartition("/")[2])
        assert (refused.status_code, refused.json()["param"]) == (404, "previous_response_id")
    assert site.get(path).status_code == 401
    assert site.get(path, mine).status_code == 200
    assert site.request("DELETE", path, mine).json()["deleted"] is True
    assert site.get(path, mine).status_code == 404


def test_a_response_expires_after_thirty_days(site):
    path = f"/v1/responses/{ask(site).json()['id']}"
    site.clock.now += 30 * 86_400 - 1
    assert site.get(path).status_code == 200
    site.clock.now += 1
    assert site.get(path).status_code == 404


def test_nothing_is_kept_when_the_caller_says_so_or_the_request_fails(site):
    hidden = ask(site, store=False).json()
    assert hidden["store"] is False
    assert site.get(f"/v1/responses/{hidden['id']}").status_code == 404
    assert ask(site, temperature=9).status_code == 400
    assert not site.store.database.engine.connect().exec_driver_sql("SELECT id FROM responses").all()


def test_a_streamed_response_is_stored_before_its_last_event(site):
    import json

    events = ask(site, stream=True).text.split("\n\n")
    last = json.loads(events[-2].partition("data: ")[2])
    assert last["type"] == "response.completed"
    assert site.get(f"/v1/responses/{last['response']['id']}").json() == last["response"]


def test_input_items_come_in_pages_in_either_order(site):
    items = [{"role": "user", "content": f"q{number}"} for number in range(5)]
    items = [entry for item in items for entry in (item, {"role": "assistant", "content": "a"})][:-1]
    path = f"/v1/responses/{ask(site, input=items).json()['id']}/input_items"
    newest = site.get(path).json()
    assert newest["data"][0]["content"] == "q4"
    page = site.get(f"{path}?order=asc&limit=2").json()
    assert (page["data"][0]["content"], page["has_more"]) == ("q0", True)
    rest = site.get(f"{path}?order=asc&limit=100&after={page['last_id']}").json()
    assert ([item["content"] for item in rest["data"]][1], rest["has_more"], len(rest["data"])) == (
        "a",
        False,
        7,
    )


@pytest.mark.parametrize(
    "query", ["stream=true", "include=file_search_call.results", "colour=red", "starting_after=3"]
)
def test_what_a_stored_response_cannot_show_is_refused(site, query):
    path = f"/v1/responses/{ask(site).json()['id']}"
    refused = site.get(f"{path}?{query}")
    assert refused.status_code == 400
    assert refused.json()["param"] in ("stream", "include", "colour", "starting_after")
