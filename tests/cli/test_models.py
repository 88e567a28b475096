from __future__ import annotations

import json


def test_what_lies_under_bise_home_is_listed_and_can_be_called_by_name(cli, home):
    (home / "models" / "mixtral-8x7b").mkdir(parents=True)
    (home / "models" / "mixtral-8x7b" / "a.safetensors").write_bytes(b"x" * 1500)
    (home / "models" / "own.gguf").write_bytes(b"x" * 10)
    (home / "cache" / "packed").mkdir(parents=True)
    (home / "cache" / "packed" / "abc-q4-v1.safetensors").write_bytes(b"x" * 7)
    report = json.loads(cli("models", "--json").out)
    local = {entry["name"]: entry for entry in report["local"]}
    assert local["mixtral-8x7b"]["bytes"] == 1500
    assert local["own"]["path"].endswith("own.gguf")
    assert local["brise"]["embedded"]
    assert report["packed_cache"]["files"] == 1
    assert report["packed_cache"]["bytes"] == 7
    known = {entry["alias"]: entry for entry in report["known"]}
    assert known["mixtral-8x7b"]["here"]
    assert not known["mistral-7b"]["here"]
    assert local["brise"]["memory_bytes"] > local["brise"]["bytes"]
    assert (local["brise"]["context"], local["brise"]["fault"]) == (1024, None)
    assert local["own"]["memory_bytes"] is None
    assert "own.gguf" in local["own"]["fault"]
    text = cli("models").out
    assert "brise (embedded)" in text
    assert "own cannot be loaded: " in text
    assert "packed cache: 1 file, 7 B" in text


def test_the_table_lists_every_alias_with_its_licence(cli):
    lines = cli("models").out.splitlines()
    line = next(line for line in lines if line.startswith("mistral-7b "))
    assert line.split() == [
        "mistral-7b",
        "14.5",
        "GB",
        "4.1",
        "GB",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "Apache-2.0",
    ]
