"""Mistral's SentencePiece and Tekken files, and GGUF copies of them, against the libraries that define
them.
"""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bise.errors import ModelFileError
from bise.text.pieces import byte_alphabet
from bise.text.sentencepiece_model import parse_model
from bise.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

pytest.importorskip("mistral_common")

SPM = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
]
STORIES = Path("../shared/data/weights/stories260K")
NUM_TEKKEN = 6000
NUM_CONTROLS = 100


def data_path() -> Path:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer._data_path()


def texts(count: int = 1000) -> list[str]:
    rng = random.Random(7)
    pool = [
        "hello",
        "world",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "ß",
        "漢",
        "字",
        "😀",
        "👨\u200d👩\u200d👧",
        "e\u0301",
        "[INST]",
        "</s>",
        "<0x0A>",
        "\u2581",
        "123",
        "4567",
        "def f(x):",
        "\r\n",
        "'s",
        "'ll",
        "ÀB",
        "ǅ",
        "\u00a0",
        "\u3000",
        "\u200b",
        "!!",
        "...",
        "/",
        "\x00",
        "\x1c",
        "<s>",
        "🇫🇷",
        "مرحبا",
        "नमस्ते",
        "𝔘",
        "ﬁ",
        "Straße",
        "I'm",
    ]
    ranges = [(32, 127), (160, 0x2000), (0x3000, 0xD7FF), (0x10000, 0x1FFFF)]

    def one() -> str:
        return rng.choice(pool) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(ranges)))

    return ["".join(one() for _ in range(rng.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=SPM)
def spm_file(request, tmp_path_factory) -> Path:
    version = request.param.rsplit(".", 1)[1]
    folder = tmp_path_factory.mktemp(version)
    return Path(shutil.copy(data_path() / request.param, folder / f"tokenizer.model.{version}"))


@pytest.fixture(scope="module")
def spm(spm_file) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of an SPM file and that of its GGUF copy."""
    return load_tokenizer(spm_file.parent, 40000), tokenizer_from_gguf(gguf_of_spm(spm_file), 40000)


def gguf_of_spm(file: Path) -> dict[str, object]:
    pieces = parse_model(file.read_bytes(), "x").pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_spm_ids_and_texts_equal_sentencepiece(spm_file, spm):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(spm_file))
    tokenizer, gguf = spm
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.chat_format == spm_file.name.rsplit(".", 1)[1]
    rng = random.Random(3)
    for text in texts():
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert gguf.encode(text) == ids, text
        anything = [rng.randrange(3 + 256, tokenizer.vocab_size) for _ in range(8)]
        assert tokenizer.decode(anything) == gguf.decode(anything) == reference.decode(anything)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_spm_without_dummy_prefix_honours_the_key(spm_file):
    metadata = gguf_of_spm(spm_file) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = tokenizer_from_gguf(metadata, 40000)
    assert tokenizer.token_bytes(tokenizer.encode("hello")[0]) == b"hello"
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    assert not tokenizer.space_prefix


@pytest.fixture(scope="module")
def tekken_document() -> dict[str, object]:
    document = json.loads((data_path() / "tekken_240911.json").read_text())
    document["vocab"] = document["vocab"][:NUM_TEKKEN]
    document["config"] |= {
        "default_vocab_size": NUM_TEKKEN + NUM_CONTROLS,
        "default_num_special_tokens": NUM_CONTROLS,
    }
    return document


@pytest.fixture(scope="module")
def tekken_folder(tmp_path_factory, tekken_document) -> Path:
    folder = tmp_path_factory.mktemp("tekken")
    (folder / "tekken.json").write_text(json.dumps(tekken_document))
    return folder


@pytest.fixture(scope="module")
def tekken(tekken_folder) -> Tokenizer:
    return load_tokenizer(tekken_folder, 10000)


def test_tekken_ids_and_bytes_equal_mistral_common(tekken_folder, tekken):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    reference = Tekkenizer.from_file(tekken_folder / "tekken.json")
    tokenizer = tekken
    assert tokenizer.chat_format == "v3-tekken"
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, bos=False, eos=False), text
        assert tokenizer.decode([1, *ids, 2]) == text
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_bytes(token_id) == reference.id_to_byte_piece(token_id)


def test_tekken_takes_a_million_spaces(tekken):
    text = "a" + " " * (1 << 20) + "b"
    assert tekken.decode(tekken.encode(text)) == text


@pytest.fixture(scope="module")
def spm_v1(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("v1")
    shutil.copy(data_path() / SPM[0], folder / "tokenizer.model.v1")
    return load_tokenizer(folder, 40000)


@pytest.mark.parametrize("unit", ["a", "ab", "é", "e\u0301", "\u0301", "1", " ", "\n", "{", "漢"])
def test_a_mebibyte_without_words_is_encoded_within_a_second(tekken, spm_v1, unit, quickest):
    text = unit * ((1 << 20) // len(unit.encode()))
    for tokenizer in (tekken, spm_v1):
        assert quickest(partial(tokenizer.encode, text), 1.0, time.process_time) < 1.0


def test_tekken_pattern_that_loses_text_is_an_error(tmp_path, tekken_document):
    config = tekken_document["config"] | {"pattern": r"\p{L}+"}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_document | {"config": config}))
    tokenizer = load_tokenizer(tmp_path, 10000)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(ModelFileError, match="would get lost"):
        tokenizer.encode("abc 1")


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Split each token by the merges of lower rank: two pieces are left, its merge."""
    merges: list[tuple[bytes, bytes]] = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
            lowest, place = min(pairs)
            assert lowest < rank
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@pytest.fixture(scope="module")
def gguf_of_tekken(tekken_document) -> Callable[..., dict[str, object]]:
    letters = {byte: char for char, byte in byte_alphabet().items()}
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken_document["vocab"]}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    controls = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        *[f"<SPECIAL_{i}>" for i in range(5, NUM_CONTROLS)],
    ]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": [*controls, *map(spell, ranks)],
        "tokenizer.ggml.token_type": [3] * NUM_CONTROLS + [1] * len(ranks),
        "tokenizer.ggml.merges": [f"{spell(left)} {spell(right)}" for left, right in merges_of(ranks)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return lambda **changes: metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_gguf_tekken_ids_equal_tiktoken(tekken_document, tekken_of_gguf):
    import tiktoken

    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken_document["vocab"]}
    pattern = tekken_document["config"]["pattern"]
    reference = tiktoken.Encoding(name="x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = tekken_of_gguf
    assert tokenizer.adds_bos
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == [token_id + NUM_CONTROLS for token_id in reference.encode_ordinary(text)], text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "smaug-bpe"])
def test_gguf_word_rules_lose_no_text(pre, gguf_of_tekken):
    tokenizer = tokenizer_from_gguf(gguf_of_tekken(pre=pre), 10000)
    assert tokenizer.adds_bos is (pre == "llama-bpe")
    for text in texts(200):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", [b"1234", b" 1"]),
        ("llama-bpe", [b"123", b"4", b" ", b"1"]),
        ("default", [b"123", b"4", b" ", b"1"]),
        ("tekken", [b"1", b"2", b"3", b"4", b" ", b"1"]),
    ],
)
def test_gguf_word_rules_cut_numbers_as_named(pre, expected):
    tokens = ["</s>", *byte_alphabet(), "12", "123", "1234", "\u01201"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "\u0120 1"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = tokenizer_from_gguf(metadata, 300)
    assert [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("1234 1")] == expected


@pytest.fixture(scope="module")
def tekken_of_gguf(gguf_of_tekken) -> Tokenizer:
    return tokenizer_from_gguf(gguf_of_tekken(), 10000)


def test_control_strings_stay_text_in_every_vocabulary(spm, tekken, tekken_of_gguf):
    for tokenizer in (*spm, tekken, tekken_of_gguf):
        controls = set(tokenizer.controls.values())
        assert {1, 2} <= controls
        for text in [*tokenizer.controls, "a</s>b", "<s>[INST]"]:
            ids = tokenizer.encode(text)
            assert controls.isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_stories260k_vocabulary_reproduces_the_expected_ids():
    if not STORIES.exists():
        pytest.skip("../shared/data/weights/stories260K is not here")
    data = (STORIES / "tok512.bin").read_bytes()
    place, tokens, scores = 4, list[str](), list[float]()
    while place < len(data):
        score, size = struct.unpack_from("<fi", data, place)
        tokens.append(data[place + 8 : place + 8 + size].decode().replace(" ", "\u2581"))
        scores.append(score)
        place += 8 + size
    tokens[1:3] = ["<s>", "</s>"]
    types = [2, 3, 3] + [6 if re.fullmatch("<0x..>", token) else 1 for token in tokens[3:]]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }
    tokenizer = tokenizer_from_gguf(metadata, 512)
    for case in json.loads((STORIES / "expected.json").read_text())["cases"]:
        assert [1, *tokenizer.encode(case["prompt"])] == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]


def test_versioned_file_wins_over_tokenizer_json(spm_file, tmp_path):
    shutil.copy(spm_file, tmp_path)
    (tmp_path / "tokenizer.json").write_text("not even JSON")
    assert load_tokenizer(tmp_path, 40000).chat_format is not None


def test_bare_tokenizer_model_names_no_chat_format(tmp_path):
    shutil.copy(data_path() / SPM[0], tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path, 32000)
    assert tokenizer.chat_format is None
    assert tokenizer.encode("hello") == [6312, 28709]


def test_directory_without_tokenizer_names_the_known_files(tmp_path):
    with pytest.raises(ModelFileError, match=r"known: tokenizer\.json, tekken\.json"):
        load_tokenizer(tmp_path, 100)
