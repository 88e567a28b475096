"""POST /v1/embeddings with both clients, against vectors computed here."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
from mistralai.client import Mistral
from openai import OpenAI


@pytest.fixture
def client(live):
    with OpenAI(api_key="none", base_url=f"{live.url}/v1", max_retries=0) as client:
        yield client


def test_both_clients_get_the_same_unit_vectors(live, client):
    answer = client.embeddings.create(model="stub", input=["one", "two"])  # asks for base64 by itself
    assert [row.index for row in answer.data] == [0, 1]
    first = np.array(answer.data[0].embedding)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    assert answer.usage.prompt_tokens == 8
    with Mistral(api_key="none", server_url=live.url) as mistral:
        same = mistral.embeddings.create(model="stub", inputs=["one", "two"])
    assert np.allclose(same.data[0].embedding, first)
    assert same.id
    assert same.object == "list"


def test_tokens_are_taken_as_text_is(live, client):
    text = client.embeddings.create(model="stub", input="Hi", encoding_format="float")
    ids = client.embeddings.create(model="stub", input=[256, 72, 105], encoding_format="float")
    assert text.data[0].embedding == ids.data[0].embedding


def test_fewer_dimensions_keep_unit_length(live, client):
    row = client.embeddings.create(model="stub", input="Hi", dimensions=4).data[0].embedding
    assert len(row) == 4
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


def rows_of(live, texts, **fields):
    reply = live.post("/v1/embeddings", {"model": "stub", "input": texts, **fields}).json()
    return [row["embedding"] for row in reply["data"]]


def test_the_last_token_can_be_asked_for_instead_of_the_mean(live):
    assert rows_of(live, "Hi", pooling="mean") == rows_of(live, "Hi")
    (last,) = rows_of(live, "Hi", pooling="last")
    assert np.linalg.norm(last) == pytest.approx(1, abs=1e-6)
    assert rows_of(live, [65], pooling="last") == rows_of(live, [65]), "one token is its own mean"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_has_the_same_bits_alone_and_among_others(live, pooling):
    texts = ["a" * length for length in (1, 3, 40, 7, 40, 90)]
    together = rows_of(live, texts, pooling=pooling)
    assert [rows_of(live, text, pooling=pooling)[0] for text in texts] == together


@pytest.mark.parametrize("kind", ["int8", "uint8", "binary", "ubinary"])
def test_smaller_types_follow_from_the_floats(live, kind):
    def ask(**fields):
        reply = live.post("/v1/embeddings", {"model": "stub", "input": "Hi", **fields})
        return reply.json()["data"][0]["embedding"]

    values = np.array(ask())
    bits = np.packbits(values > 0)
    expected = {
        "int8": np.rint(values * 127),
        "uint8": np.rint(values * 127) + 128,
        "ubinary": bits,
        "binary": bits.astype(int) - 128,
    }[kind]
    assert ask(output_dtype=kind) == expected.astype(int).tolist()
    packed = base64.b64decode(ask(output_dtype=kind, encoding_format="base64"))
    kinds = {"int8": np.int8, "binary": np.int8}
    assert np.frombuffer(packed, kinds.get(kind, np.uint8)).tolist() == expected.astype(int).tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"input": []},
        {"input": ""},
        {"dimensions": 1000},
        {"input": [10**6]},
        {"input": ["x"] * 200},
        {"extra_body": {"pooling": "max"}},
    ],
)
def test_what_cannot_be_done_is_400(live, client, fields):
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(**{"model": "stub", "input": "Hi", **fields})
