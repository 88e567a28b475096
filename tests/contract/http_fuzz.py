# ruff: noqa: E501 - tables are read across
"""Bad HTTP, bad JSON and bad parameters against a server on loopback, and what became of each.

    python tests/contract/http_fuzz.py --port 8000 --model brise [--mutations 10000] [--seed 1]

A case fails when the server answers 5xx (501 apart), accepts what it must refuse, drops the connection without
an answer, or takes longer than `--limit` seconds. Exit code 1 when any case fails or the server is not the same
afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from raw_http import Wire, ask, post

ANY, REFUSED = "answered", "refused"


@dataclass(frozen=True)
class Case:
    """One request and what may become of it."""

    name: str
    data: bytes
    expect: str = REFUSED


KINDS: dict[str, Any] = {
    "string": "x", "integer": 7, "negative": -1, "real": 1.5, "true": True, "array": [], "object": {},
    "array of arrays": [[[]]], "huge": 10**30, "tiny": -(10**30), "text number": "1", "array of null": [None],
}  # fmt: skip

# Field: the kinds above that may be accepted, then values that must be refused.
SAMPLING: dict[str, tuple[str, list[Any]]] = {
    "model": ("string|text number", ["", "../../etc/passwd", "x" * 600, "a\u0000b"]),
    "temperature": ("real", [-0.1, 2.1, 1e300, "0.5"]),
    "top_p": ("", [0, -0.1, 1.01, 2]),
    "top_k": ("integer", [-1, 1.5, 1 << 40]),
    "min_p": ("", [-0.1, 1.1]),
    "typical_p": ("", [0, 1.5]),
    "presence_penalty": ("real|negative", [-2.1, 2.1]),
    "frequency_penalty": ("real|negative", [-2.1, 2.1]),
    "repetition_penalty": ("integer|real", [0, -1, 1000]),
    "logit_bias": ("object", [{"x": 1}, {"1": 101}, {"1": -101}, {"-1": 1}, {"1": "a"}, {"999999999": 1},
                              {str(i): 1 for i in range(2000)}, {"1.5": 1}]),
    "seed": ("integer|negative", [1.5, 1 << 70]),
    "random_seed": ("integer", [-1, 1.5, 1 << 70]),
    "min_tokens": ("integer", [-1, 1.5, 1 << 40]),
    "stop": ("string|text number|array", ["", [""], [1], ["x"] * 17, "y" * 300, ["y" * 300], [["x"]], {"a": 1}]),
    "stop_token_ids": ("array", [["x"], [-1], [1.5], "x"]),
    "ignore_eos": ("true", ["yes", 1]),
    "stream": ("true", ["true", 1]),
    "stream_options": ("", [{"include_usage": True}, {"include_usage": 1}, "x", {"include_obfuscation": True}]),
    "metadata": ("object", ["x", [1]]),
}  # fmt: skip

CHAT: dict[str, tuple[str, list[Any]]] = SAMPLING | {
    "messages": ("", [[], [{}], ["x"], [{"role": "user"}], [{"role": "alien", "content": "x"}],
                      [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "text"}]}],
                      [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
                      [{"role": "assistant", "content": "x"}], [{"role": "tool", "content": "x"}],
                      [{"role": "user", "content": "x"}] * 5000, [None], [[]],
                      [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": 1}],
                      [{"role": "user", "content": "a"},
                       {"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]},
                       {"role": "tool", "content": "x"}],
                      [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "x"},
                       {"role": "user", "content": "y"}],
                      [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [7]},
                       {"role": "user", "content": "y"}],
                      [{"role": "user", "content": "a", "name": "a b"}], [{"role": "user", "content": "a", "name": 5}],
                      [{"role": "user", "content": "a", "cache_control": {}}], [{"role": ["user"], "content": "a"}],
                      [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "no"},
                       {"role": "user", "content": "b"}],
                      [{"role": "user", "content": "a"},
                       {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
                       {"role": "tool", "tool_call_id": "b", "content": "1"}],
                      [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c", "prefix": True}]]),
    "max_tokens": ("integer", [0, -1, 1.5, 1 << 40, "1"]),
    "max_completion_tokens": ("integer", [0, -1, 1.5]),
    "n": ("integer", [0, -1, 17, 1_000_000, 1.5]),
    "logprobs": ("true", [1, "x"]),
    "top_logprobs": ("", [1, 21, -1]),
    "prompt_logprobs": ("true", [1, "x"]),
    "response_format": ("", [{"type": "xml"}, {"type": "json_schema"}, {"type": 5}, "json",
                             {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strange"}}},
                             {"type": "text", "json_schema": {"name": "a", "schema": {}}},
                             {"type": "json_object", "schema": {}}, {"type": ["text"]}, {}, [],
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "more": 1}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": []}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"minimum": 5, "maximum": 3}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nope"}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "("}}},
                             {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}},
                             {"type": "json_schema",
                              "json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1/x"}}}]),
    "tools": ("array", [[{}], [{"type": "function"}], ["x"], [{"type": "function", "function": {"name": ""}}],
                        [{"type": "function", "function": {"name": "a b", "parameters": {}}}],
                        [{"type": "function", "function": {"name": "a", "parameters": {"type": 5}}}],
                        [{"type": "function", "function": {"name": "a", "parameters": []}}],
                        [{"type": "function", "function": {"name": "a", "parameters": {}}}] * 200,
                        [{"type": "retrieval"}], [None], [{"type": "function", "function": None}],
                        [{"type": "function", "function": {"name": "a", "strict": "x"}}],
                        [{"type": "function", "function": {"name": "a", "more": 1}}]]),
    "tool_choice": ("", ["sometimes", "required", {"type": "function", "function": {"name": "f"}}, {}, 5]),
    "parallel_tool_calls": ("true", ["x", 1]),
    "prediction": ("", [{"type": "image"}, {"type": "content", "content": 5}, "x", {"type": "content"},
                        {"type": "content", "content": "x", "speed": 2},
                        {"type": "content", "content": [{"type": "image_url"}]}]),
    "safe_prompt": ("true", ["x", 1]),
    "reasoning_effort": ("", ["extreme", 5]),
    "prompt_mode": ("", ["fast", 5]),
    "guardrails": ("array", [[{"x": 1}]]),
    "functions": ("array", [[{"name": "f"}]]),
    "function_call": ("array", ["auto"]),
    "audio": ("array", [{"voice": "x"}]),
    "modalities": ("array", [["audio"]]),
    "verbosity": ("", ["low"]),
    "store": ("", [True]),
    "user": ("string|text number", []),
}  # fmt: skip

TEXT: dict[str, tuple[str, list[Any]]] = SAMPLING | {
    "prompt": ("string|text number", [[], [""] * 3000, [None], [[]], [-1], [10**9], [1.5], ["a", 1], [[1], ["a"]]]),
    "max_tokens": ("integer", [-1, 1.5, 1 << 40]),
    "n": ("integer", [0, 17, 1.5]),
    "best_of": ("integer", [0, 17, 1_000_000]),
    "echo": ("true", ["x"]),
    "logprobs": ("", [-1, 6, 1_000_000]),
    "suffix": ("string|text number", []),
}  # fmt: skip

FIM: dict[str, tuple[str, list[Any]]] = SAMPLING | {
    "prompt": ("string|text number", [[1], ["a"]]),
    "suffix": ("string|text number", []),
    "max_tokens": ("integer", [0, -1]),
}

EMBED: dict[str, tuple[str, list[Any]]] = {
    "model": ("string|text number", ["", "nope"]),
    "input": ("string|text number", [[], [None], [-1], [[]], [["a"]], ["a", 1], [1 << 40]]),
    "encoding_format": ("", ["hex", 5]),
    "dimensions": ("integer", [0, -1, 1.5, 1 << 30]),
    "output_dtype": ("", ["float8"]),
}

RESPONSES: dict[str, tuple[str, list[Any]]] = {
    "model": ("string|text number", [""]),
    "input": ("string|text number", [[], [{"type": "strange"}], ["x"], [{"role": "user", "content": [{}]}],
                                     [{"type": "function_call"}], [{"type": "function_call_output"}], [{}],
                                     [{"type": ["message"]}], [{"role": "robot", "content": "x"}],
                                     [{"role": "user", "content": "x", "weird": 1}], [{"type": "item_reference"}]]),
    "include": ("array", [["x"], [1], ["reasoning.encrypted_content"]]),
    "context_management": ("array", [[{"type": "compaction"}]]),
    "stream_options": ("object", [{"include_obfuscation": True}, {"x": 1}]),
    "instructions": ("string|text number", []),
    "tools": ("array", [[{"type": "web_search"}], [{}], ["x"]]),
    "tool_choice": ("", ["sometimes", "required", {}]),
    "text": ("object", [{"format": {"type": "xml"}}, {"format": 5}, {"format": {"type": "json_schema", "name": "a"}},
                        {"format": {"type": "text", "schema": {}}}, {"x": 1}]),
    "reasoning": ("object", [{"effort": "extreme"}, {"summary": "detailed"}, {"x": 1}]),
    "max_output_tokens": ("integer", [0, -1, 1.5]),
    "temperature": ("real", [-1, 3]),
    "top_logprobs": ("integer", [21, -1]),
    "previous_response_id": ("", ["resp_nope", 5]),
    "background": ("", [True]),
    "truncation": ("", ["oldest", "Auto"]),
    "stream": ("true", ["x"]),
    "metadata": ("object", [{"a": 1}]),
}  # fmt: skip

MESSAGES: dict[str, tuple[str, list[Any]]] = {
    "model": ("string|text number", [""]),
    "messages": ("", [[], [{}], [{"role": "system", "content": "x"}], [{"role": "user", "content": []}],
                      [{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": 5}],
                      [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}], ["x"]]),
    "max_tokens": ("integer", [0, -1, 1.5, None]),
    "system": ("string|text number|array", [[{"type": "image"}]]),
    "temperature": ("", [1.1, -1]),
    "stop_sequences": ("array", [[""], [1]]),
    "tools": ("array", [[{"name": "x"}], [{"type": "bash_20250124", "name": "bash"}]]),
    "tool_choice": ("", [{"type": "x"}, {"type": "tool"}, {"type": "any"}]),
    "top_k": ("integer", [-1]),
}  # fmt: skip


def endpoints(model: str) -> dict[str, tuple[dict[str, Any], dict[str, tuple[str, list[Any]]]]]:
    """Return every endpoint with a good body and its fields."""
    turns = [{"role": "user", "content": "Hi"}]
    return {
        "/v1/chat/completions": ({"model": model, "messages": turns, "max_tokens": 2}, CHAT),
        "/v1/completions": ({"model": model, "prompt": "Hi", "max_tokens": 2}, TEXT),
        "/v1/fim/completions": ({"model": model, "prompt": "Hi", "max_tokens": 2}, FIM),
        "/v1/embeddings": ({"model": model, "input": "Hi"}, EMBED),
        "/v1/responses": ({"model": model, "input": "Hi", "max_output_tokens": 2}, RESPONSES),
        "/v1/messages": ({"model": model, "messages": turns, "max_tokens": 2}, MESSAGES),
    }


def parameter_cases(model: str) -> Iterator[Case]:
    """Yield one case per field and bad value."""
    for path, (good, fields) in endpoints(model).items():
        for field, (allowed, bad) in fields.items():
            accepted = set(allowed.split("|"))
            values = [(kind, value) for kind, value in KINDS.items() if kind not in accepted]
            values += [(f"bad {index}", value) for index, value in enumerate(bad)]
            for label, value in values:
                body = json.dumps({**good, field: value}).encode()
                yield Case(f"{path} {field}: {label}", post(path, body))
        for field in ("model", "messages", "prompt", "input"):
            if field in good:
                body = json.dumps({key: value for key, value in good.items() if key != field}).encode()
                yield Case(f"{path} without {field}", post(path, body))


def json_cases(model: str) -> Iterator[Case]:
    """Yield bodies that are no clean JSON."""
    path = "/v1/chat/completions"
    good = json.dumps(endpoints(model)[path][0]).encode()
    bodies = {
        "empty": b"", "spaces": b"   ", "cut": good[:-1], "twice": good + good, "tail": good + b"x",
        "single quotes": good.replace(b'"', b"'"), "comment": good[:-1] + b"/*x*/}", "comma": good[:-1] + b",}",
        "bom": b"\xef\xbb\xbf" + good, "utf-16": good.decode().encode("utf-16"), "latin-1": b'{"model":"\xe9"}',
        "NaN": good[:-1] + b',"temperature":NaN}', "Infinity": good[:-1] + b',"temperature":Infinity}',
        "1e999": good[:-1] + b',"temperature":1e999}', "long number": good[:-1] + b',"seed":' + b"1" * 9999 + b"}",
        "duplicate": good[:-1] + b',"max_tokens":3}', "deep array": b"[" * 5000 + b"]" * 5000,
        "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000, "unclosed": b"[" * 200_000,
        "surrogate": b'{"model":"\\ud800","messages":[]}', "NUL": good.replace(b"Hi", b"\x00"),
        "bare string": b'"x"', "number": b"5", "null": b"null", "array": b"[]", "true": b"true",
        "million values": b'{"x":[' + b"0," * 1_000_000 + b"0]}", "xml": b"<model/>", "form": b"model=x&messages=",
        "gzip bytes": b"\x1f\x8b\x08\x00" + b"x" * 20, "high bytes": bytes(range(128, 256)),
        "huge key": b'{"' + b"k" * 1_000_000 + b'":1}',
    }  # fmt: skip
    for name, body in bodies.items():
        yield Case(f"json {name}", post(path, body))


def http_cases() -> Iterator[Case]:
    """Yield what is hardly HTTP."""
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    heads = {
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n", "two hosts": get + b"Host: x\r\n\r\n",
        "foreign host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "foreign origin": get + b"Origin: https://evil.example\r\n\r\n", "null origin": get + b"Origin: null\r\n\r\n",
        "200 headers": get + b"X: y\r\n" * 200 + b"\r\n", "long header": get + b"X: " + b"y" * 20_000 + b"\r\n\r\n",
        "8 MiB header": get + b"X: " + b"y" * (8 << 20) + b"\r\n\r\n",
        "long name": get + b"X" * 20_000 + b": y\r\n\r\n", "long target": b"GET /" + b"a" * 20_000 + get[14:] + b"\r\n",
        "no version": b"GET /v1/models\r\nHost: localhost\r\n\r\n", "HTTP/3": b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n",
        "bad method": b"G<T / HTTP/1.1\r\nHost: localhost\r\n\r\n", "space in name": get + b"A B: c\r\n\r\n",
        "space before colon": get + b"A : c\r\n\r\n", "no colon": get + b"abc\r\n\r\n", "fold": get + b"A: b\r\n c\r\n\r\n",
        "NUL": get + b"A: \x00\r\n\r\n", "bare CR": get + b"A: b\rc\r\n\r\n", "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01",
        "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "garbage": bytes(range(256)),
        "CL and TE": get[:-2].replace(b"GET", b"POST") + b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two CL": get.replace(b"GET", b"POST") + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "same CL twice": get.replace(b"GET", b"POST") + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
        "CL list": get.replace(b"GET", b"POST") + b"Content-Length: 1, 2\r\n\r\nab",
        "negative CL": get.replace(b"GET", b"POST") + b"Content-Length: -5\r\n\r\n",
        "hex CL": get.replace(b"GET", b"POST") + b"Content-Length: 0x10\r\n\r\n",
        "plus CL": get.replace(b"GET", b"POST") + b"Content-Length: +1\r\n\r\na",
        "huge CL": get.replace(b"GET", b"POST") + b"Content-Length: 99999999999999999999999\r\n\r\n",
        "17 MiB CL": post("/v1/chat/completions", b"", length=17 << 20),
        "TE gzip": get.replace(b"GET", b"POST") + b"Transfer-Encoding: gzip\r\n\r\n",
        "TE twice": get.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "TE odd": get.replace(b"GET", b"POST") + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "bad chunk size": get.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        "negative chunk": get.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        "huge chunk": get.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        "chunk without end": get.replace(b"GET", b"POST") + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n",
        "absolute target": b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "CONNECT": b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", "TRACE": b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "upgrade with body": get.replace(b"GET", b"POST") + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\na",
        "gzip body": post("/v1/chat/completions", b"{}", "Content-Encoding: gzip"),
        "two types": post("/v1/chat/completions", b"{}", "Content-Type: text/plain"),
        "bad expect": post("/v1/chat/completions", b"{}", "Expect: 200-maybe"),
    }  # fmt: skip
    for name, data in heads.items():
        yield Case(f"http {name}", data)
    yield from target_cases()


def target_cases() -> Iterator[Case]:
    """Yield paths, queries and methods that nobody should send."""
    paths = [
        "/", "//v1/models", "/v1//models", "/v1/models/..", "/v1/models/%2e%2e%2fetc", "/v1/../v1/models", "/v1/models/%00",
        "/v1/models/%ff", "/v1/models/a%0d%0ab", "/V1/MODELS", "/v1/models;x=1", "/v1/models%2f", "/.env", "/v1/chat",
        "/v1/models/" + "a" * 5000, "/%", "/v1/models?x=" + "y" * 9000, "/v1/files/../../x", "/v1/models/stub%20",
        "/\\v1\\models", "/v1/responses/resp_1", "/v1/responses/resp_1/input_items", "/metrics/x", "/openapi.json/",
    ]  # fmt: skip
    for path in paths:
        yield Case(f"path {path[:40]}", f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), ANY)
    queries = [
        "/v1/files?colour=red", "/v1/files?limit=0", "/v1/files?page=-1", "/v1/files?limit=" + "9" * 30,
        "/v1/files?source=moon", "/v1/batches?after=x", "/v1/batch/jobs?status=BAD", "/v1/batch/jobs?created_after=x",
        "/v1/responses/resp_x?stream=true", "/v1/responses/resp_x/input_items?order=up", "/v1/usage?by=moon",
    ]  # fmt: skip
    for query in queries:
        yield Case(f"query {query[:40]}", f"GET {query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    keys = {"empty": "", "long": "k" * 201, "tab": "a\tb"}
    for name, key in keys.items():
        data = post("/v1/chat/completions", b"{}", f"Idempotency-Key: {key}")
        yield Case(f"idempotency key {name}", data)
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PROPFIND"):
        for path in ("/v1/chat/completions", "/v1/models", "/health", "/v1/moderations"):
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            yield Case(f"method {method} {path}", head.encode(), ANY)


def mutations(model: str, count: int, seed: int) -> Iterator[Case]:
    """Yield good bodies with a few bytes or values changed at random."""
    chance = random.Random(seed)
    goods = [(path, good) for path, (good, _) in endpoints(model).items()]
    pool = [*KINDS.values(), None, 0, "", "a" * 5000, {"a": {"a": {}}}, 1e-300]
    for number in range(count):
        path, good = chance.choice(goods)
        if chance.random() < 0.5:
            data = bytearray(json.dumps(good).encode())
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(len(data))
                choice = chance.random()
                if choice < 0.4:
                    data[place] = chance.randrange(256)
                elif choice < 0.7:
                    del data[place : place + chance.randint(1, 5)]
                    data = data or bytearray(b"x")
                else:
                    data[place:place] = bytes(
                        chance.choices(b'{}[]",:0123456789eE.-tfn\\u', k=chance.randint(1, 4))
                    )
            body = bytes(data)
        else:
            fields = dict(good)
            names = list(endpoints(model)[path][1])
            for _ in range(chance.randint(1, 3)):
                fields[chance.choice(names)] = chance.choice(pool)
            fields.setdefault("max_tokens", 2)
            body = json.dumps(fields).encode()
        yield Case(f"mutation {number} {path}", post(path, body), ANY)


def all_cases(model: str) -> list[Case]:
    """Return every case that is not random."""
    return [*parameter_cases(model), *json_cases(model), *http_cases()]


def outcome(port: int, case: Case, limit_s: float) -> str | None:
    """Send one case and return what is wrong with the answer, None when nothing is."""
    start = time.perf_counter()
    try:
        with Wire(port, timeout=limit_s) as wire:
            wire.send(case.data)
            reply = wire.reply()
    except TimeoutError:
        return "no answer in time"
    took = time.perf_counter() - start
    if reply.status == 0:
        return "connection dropped"
    if reply.status >= 500 and reply.status != 501:
        return f"server error {reply.status}: {reply.body[:200]!r}"
    if case.expect == REFUSED and reply.status < 400:
        return f"accepted with {reply.status}"
    if reply.status >= 400 and not case.name.startswith("method HEAD"):
        try:
            body = json.loads(reply.body)
        except ValueError:
            return f"{reply.status} without JSON: {reply.body[:80]!r}"
        if not body.get("error", {}).get("message"):
            return f"{reply.status} without a message"
        if "Traceback" in reply.body.decode("utf-8", "replace") or "/src/" in str(body):
            return "the answer shows the inside"
    return f"took {took:.1f} s" if took > limit_s else None


def baseline(port: int, model: str) -> bytes:
    """Return a greedy answer, to compare before and after."""
    fields = {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    return json.dumps(
        ask(port, post("/v1/chat/completions", json.dumps(fields).encode())).json["choices"]
    ).encode()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="brise")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=5.0)
    options = parser.parse_args()
    before = baseline(options.port, options.model)
    cases = [*all_cases(options.model), *mutations(options.model, options.mutations, options.seed)]
    failures = 0
    for case in cases:
        wrong = outcome(options.port, case, options.limit)
        if wrong is not None:
            failures += 1
            print(f"{case.name}: {wrong}")
    same = baseline(options.port, options.model) == before
    print(
        f"{len(cases)} cases, {failures} failed; the answer afterwards is {'the same' if same else 'DIFFERENT'}"
    )
    return 1 if failures or not same else 0


if __name__ == "__main__":
    sys.exit(main())
