"""Personas over HTTP: kept, given to conversations as a copy, and nobody else's."""

from __future__ import annotations

API = "/api/v1"
POET = {"name": "  A   poet ", "system": "Answer in verse.", "params": {"temperature": 1.2}}


def test_a_conversation_takes_a_copy_of_its_persona(run):
    async def scenario(client):
        made = await client.post(f"{API}/personas", json=POET)
        assert made.status_code == 201
        poet = made.json()
        assert (poet["name"], poet["model"]) == ("A poet", None)
        talk = (await client.post(f"{API}/conversations", json={"persona_id": poet["id"]})).json()
        assert (talk["persona_id"], talk["system"]) == (poet["id"], "Answer in verse.")
        assert talk["params"] == {"temperature": 1.2}
        change = {"system": "In prose.", "model": "scripted-7b"}
        assert (await client.patch(f"{API}/personas/{poet['id']}", json=change)).status_code == 200
        kept = (await client.get(f"{API}/conversations/{talk['id']}")).json()["conversation"]
        assert kept["system"] == "Answer in verse."
        await client.patch(f"{API}/conversations/{talk['id']}", json={"persona_id": poet["id"]})
        kept = (await client.get(f"{API}/conversations/{talk['id']}")).json()["conversation"]
        assert (kept["system"], kept["model"]) == ("In prose.", "scripted-7b")
        assert (await client.delete(f"{API}/personas/{poet['id']}")).status_code == 204
        assert (await client.get(f"{API}/bootstrap")).json()["personas"] == []

    run(scenario)


def test_a_persona_is_refused_with_the_field_that_is_wrong(run):
    async def scenario(client):
        await client.post(f"{API}/personas", json=POET)
        for body, status, param in (
            (POET, 409, "name"),
            ({"system": "x"}, 400, "name"),
            ({"name": " "}, 400, "name"),
            ({"name": "x", "color": 1}, 400, "body"),
            ({"name": "x", "params": {"temperature": 9}}, 400, "params.temperature"),
            ({"name": "x\0"}, 400, "body"),
        ):
            answer = await client.post(f"{API}/personas", json=body)
            assert (answer.status_code, answer.json()["param"]) == (status, param), body

    run(scenario)


def test_someone_elses_persona_does_not_exist(run):
    async def scenario(client):
        poet = (await client.post(f"{API}/personas", json=POET)).json()
        bob = {"x-person": "bob"}
        path = f"{API}/personas/{poet['id']}"
        assert (await client.get(f"{API}/personas", headers=bob)).json() == {"personas": []}
        assert (await client.patch(path, json={"name": "mine"}, headers=bob)).status_code == 404
        assert (await client.delete(path, headers=bob)).status_code == 404
        body = {"persona_id": poet["id"]}
        assert (await client.post(f"{API}/conversations", json=body, headers=bob)).status_code == 404
        assert (await client.post(f"{API}/personas", json=POET, headers=bob)).status_code == 201

    run(scenario)
