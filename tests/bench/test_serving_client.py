"""The client of the load benchmarks: whatever way the bytes are cut, the same answer comes out."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serving_client import ask, quantile
from serving_trace import Trace, tokens_of

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = (
    b'data: {"choices": [{"text": " t1f"}]}\n\n',
    b": ping\n\n",
    b'data: {"choices": [{"delta": {"content": " t2"}}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n',
    b"data: [DONE]\n\n",
)
FAILURE = b'data: {"error": {"code": "no"}}\n\n'
CHUNKED = HEAD + b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in EVENTS) + b"0\r\n\r\n"


async def answered(data: bytes, size: int):
    async def serve(reader, writer):
        await reader.readuntil(b"}")
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        return await ask(f"http://127.0.0.1:{port}", "/v1/completions", {"stream": True})


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_an_answer_is_read_whole_however_it_is_cut(size):
    answer = asyncio.run(answered(CHUNKED, size))
    assert (answer.status, answer.error, answer.text) == (200, None, " t1f t2")
    assert answer.usage == {"completion_tokens": 2}
    assert answer.ended is not None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (CHUNKED[:-80], "the connection broke"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "status 503"),
        (HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(FAILURE), FAILURE), "'code': 'no'"),
    ],
)
def test_what_goes_wrong_is_never_taken_for_an_answer(data, error):
    answer = asyncio.run(answered(data, 10_000))
    assert error in answer.error
    assert answer.ended is None


def test_a_trace_is_the_same_for_both_and_finds_its_tokens_in_an_answer_again():
    one, other = (Trace(32000, seed=3).conversation() for _ in range(2))
    assert one == other
    first = one.next_turn("")
    text = "".join(f" t{token - 259:x}" for token in (259, 300, 31999))
    assert tokens_of(text) == [259, 300, 31999]
    later = one.next_turn(text)
    assert later is None or later.prompt[: len(first.prompt) + 3] == (*first.prompt, 259, 300, 31999)


def test_a_quantile_is_one_of_the_values():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([], 0.5) is None
