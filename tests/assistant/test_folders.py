"""Folders and changes of many conversations, over HTTP."""

from __future__ import annotations

import json

API = "/api/v1"


async def made(client, title, **headers):
    answer = await client.post(f"{API}/conversations", json={"title": title}, headers=headers)
    return answer.json()["id"]


async def folders(client, **headers):
    found = (await client.get(f"{API}/folders", headers=headers)).json()["folders"]
    return {folder["name"]: folder["conversations"] for folder in found}


def test_conversations_are_filed_together_and_a_folder_is_renamed_and_dissolved(run):
    async def scenario(client):
        ids = [await made(client, f"c{number}") for number in range(3)]
        moved = await client.post(
            f"{API}/conversations/change", json={"ids": ids[:2], "changes": {"folder": " The  sis "}}
        )
        assert moved.json() == {"changed": 2}
        assert await folders(client) == {"The sis": 2}
        found = await client.get(f"{API}/folders/conversations", params={"name": "The sis"})
        assert {entry["title"] for entry in found.json()["conversations"]} == {"c0", "c1"}
        await client.post(f"{API}/folders/rename", json={"name": "The sis", "to": "Thesis"})
        assert await folders(client) == {"Thesis": 2}
        await client.delete(f"{API}/conversations/{ids[0]}")
        assert await folders(client) == {"Thesis": 1}
        await client.post(f"{API}/folders/rename", json={"name": "Thesis", "to": None})
        assert await folders(client) == {}

    run(scenario)


def test_a_change_of_many_is_all_or_nothing_and_of_a_few_fields_only(run):
    async def scenario(client):
        ids = [await made(client, "one"), "nobody's"]
        answer = await client.post(
            f"{API}/conversations/change", json={"ids": ids, "changes": {"pinned": True}}
        )
        assert answer.status_code == 404
        listing = (await client.get(f"{API}/conversations")).json()["conversations"]
        assert [entry["pinned"] for entry in listing] == [False]
        answer = await client.post(
            f"{API}/conversations/change", json={"ids": ids[:1], "changes": {"title": "all"}}
        )
        assert answer.status_code == 400

    run(scenario)


def test_someone_elses_folders_do_not_exist(run):
    async def scenario(client):
        one = await made(client, "mine")
        change = {"ids": [one], "changes": {"folder": "Secret"}}
        await client.post(f"{API}/conversations/change", json=change)
        other = {"x-person": "bob"}
        assert await folders(client, **other) == {}
        found = await client.get(f"{API}/folders/conversations", params={"name": "Secret"}, headers=other)
        assert found.json() == {"conversations": []}
        answer = await client.post(f"{API}/conversations/change", json=change, headers=other)
        assert answer.status_code == 404
        await client.post(f"{API}/folders/rename", json={"name": "Secret", "to": "Taken"}, headers=other)
        assert await folders(client) == {"Secret": 1}

    run(scenario)


def test_archived_conversations_are_listed_apart_and_still_found(run):
    async def scenario(client):
        ids = [await made(client, f"c{number}") for number in range(3)]
        change = {"ids": ids[:2], "changes": {"archived": True}}
        assert (await client.post(f"{API}/conversations/change", json=change)).json() == {"changed": 2}

        async def titles(**query):
            found = (await client.get(f"{API}/conversations", params=query)).json()["conversations"]
            return sorted(entry["title"] for entry in found)

        assert await titles() == ["c2"]
        assert await titles(archived=True) == ["c0", "c1"]
        assert await titles(q="c0") == ["c0"]
        await client.patch(f"{API}/conversations/{ids[0]}", json={"archived": False})
        assert await titles() == ["c0", "c2"]

    run(scenario)


def test_pages_of_the_list_miss_nothing_though_many_have_the_same_time(run):
    async def scenario(client):
        lines = "\n".join(
            json.dumps(
                {
                    "format": "bise-conversation-1",
                    "title": f"t{number}",
                    "created_at": 1700000000,
                    "messages": [{"id": "a", "parent": None, "role": "user", "text": "hi"}],
                }
            )
            for number in range(95)
        )
        kind = {"content-type": "application/x-ndjson"}
        assert (await client.post(f"{API}/import", content=lines, headers=kind)).status_code == 201
        seen, cursor = [], (await client.get(f"{API}/bootstrap")).json()["cursor"]
        seen += [e["title"] for e in (await client.get(f"{API}/conversations")).json()["conversations"]]
        while cursor is not None:
            page = (await client.get(f"{API}/conversations", params={"cursor": cursor})).json()
            seen += [entry["title"] for entry in page["conversations"]]
            cursor = page["cursor"]
        assert sorted(seen) == sorted(f"t{number}" for number in range(95))

    run(scenario)


def test_several_conversations_are_deleted_and_brought_back_at_once(run):
    async def scenario(client):
        ids = [await made(client, f"c{number}") for number in range(3)]
        await client.post(f"{API}/conversations/delete", json={"ids": ids[:2]})
        assert len((await client.get(f"{API}/conversations")).json()["conversations"]) == 1
        await client.post(f"{API}/conversations/restore", json={"ids": ids[:2]})
        assert len((await client.get(f"{API}/conversations")).json()["conversations"]) == 3

    run(scenario)
