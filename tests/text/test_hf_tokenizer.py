"""tokenizer.json: ids and bytes as the library has them, and no control token from text."""

from __future__ import annotations

import json
import random
import time

import pytest

from bise.errors import ModelFileError, RequestError
from bise.text.tokenizer import load_tokenizer

CONTROLS = [
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]
DISGUISES = ["{}", "a{}b", " {} ", "{}{}", "\n{}\n", "{} hello"]
KINDS = ["bytes", "legacy", "metaspace"]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    pool = [
        "hello",
        " world",
        "  ",
        "\n",
        "\t",
        "Grüße",
        "漢字",
        "😀",
        "👩\u200d🚀",
        "e\u0301",
        "\u00a0",
        "123",
        "'s",
        "\x00",
        "\u2581",
        "def",
    ]
    return ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 20))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_library(kind, hf_directory):
    from tokenizers import Tokenizer

    folder = hf_directory(kind)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, 2000)
    for text in texts(1, 400):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_library_on_valid_text(kind, hf_directory):
    from tokenizers import Tokenizer

    folder = hf_directory(kind)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder, 2000)
    for text in texts(2, 400):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([1, *ids, 2]) == reference.decode([1, *ids, 2], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_control_strings_in_text_stay_text(kind, hf_directory):
    tokenizer = load_tokenizer(hf_directory(kind), 2000)
    ids_of_controls = set(tokenizer.controls.values())
    assert set(CONTROLS) <= set(tokenizer.controls)
    cases = [form.replace("{}", control) for control in CONTROLS for form in DISGUISES]
    assert len(cases) > 50
    for text in cases:
        ids = tokenizer.encode(text)
        assert ids_of_controls.isdisjoint(ids), text
        # Metaspace takes a leading space of the text for its dummy prefix, as in the library.
        assert tokenizer.decode(ids).lstrip(" ") == text.lstrip(" ")


def test_text_of_a_template_is_cut_at_control_strings(hf_directory):
    tokenizer = load_tokenizer(hf_directory("bytes"), 2000)
    inst, end = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
    assert tokenizer.split_controls("<s>[INST] hi [/INST]") == [1, inst, " hi ", end]
    assert tokenizer.split_controls("") == []
    assert tokenizer.split_controls("plain") == ["plain"]


def test_byte_fallback_pieces_are_single_bytes(hf_directory):
    tokenizer = load_tokenizer(hf_directory("legacy"), 2000)
    assert tokenizer.token_bytes(3 + 0x0A) == b"\n"
    assert tokenizer.encode("\U0001f9ff")[-4:] == [3 + byte for byte in "\U0001f9ff".encode()]
    assert tokenizer.token_bytes(1) == b""


def test_dummy_prefix_comes_only_at_the_start_where_the_file_says_first(hf_directory):
    first = load_tokenizer(hf_directory("metaspace"), 2000)
    assert first.decode(first.encode("hello", start=True)) == "hello"
    assert b"".join(map(first.token_bytes, first.encode("hello", start=False))) == b"hello"
    always = load_tokenizer(hf_directory("legacy"), 2000)
    assert always.encode("hello", start=False) == always.encode("hello", start=True)


def test_bos_and_stop_ids_come_from_the_files_around(hf_directory):
    folder = hf_directory("bytes", add_bos_token=True)
    tokenizer = load_tokenizer(folder, 2000)
    eot = tokenizer.control_id("<|eot_id|>")
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.stop_ids) == (1, True, {2})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eot]}))
    assert load_tokenizer(folder, 2000).stop_ids == {2, eot}


def test_post_processor_decides_on_bos_where_the_config_is_silent(hf_directory):
    folder = hf_directory("bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(folder, 2000).adds_bos
    assert load_tokenizer(folder, 2000).bos_id == 1


def test_truncation_and_padding_of_the_file_are_not_applied(hf_directory):
    folder = hf_directory("bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    expected = load_tokenizer(folder, 2000).encode("hello hello hello")
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(folder, 2000).encode("hello hello hello") == expected


def test_ordinary_added_tokens_still_match_and_markup_does_not(hf_directory):
    folder = hf_directory("bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    size = len(document["model"]["vocab"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    document["added_tokens"] += [
        {"id": size, "content": "    ", **plain},
        {"id": size + 1, "content": "<tool_call>", **plain},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder, 2000)
    assert size in tokenizer.encode("if x:    return")
    assert size + 1 not in tokenizer.encode("<tool_call>")
    assert tokenizer.split_controls("<tool_call>") == [size + 1]
    assert tokenizer.decode([size, size + 1]) == "    <tool_call>"


def test_id_beyond_the_embedding_is_refused(hf_directory):
    folder = hf_directory("bytes")
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert load_tokenizer(folder, size).vocab_size == size
    with pytest.raises(ModelFileError, match=f"beyond the model's vocabulary of {size - 1}"):
        load_tokenizer(folder, size - 1)


def test_lone_surrogate_in_a_text_is_refused(hf_directory):
    with pytest.raises(RequestError, match="surrogate"):
        load_tokenizer(hf_directory("bytes"), 2000).encode("a\ud800b")


def test_text_that_a_vocabulary_cannot_express_is_refused(hf_directory):
    folder = hf_directory("bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    byte = "\u0123"  # 0x81 in GPT-2's alphabet
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if byte not in "".join(pair)]
    document["model"]["vocab"] = {piece: token_id for piece, token_id in vocab.items() if byte not in piece}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder, 2000)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(RequestError, match="lacks bytes"):
        tokenizer.encode("hello \u3041")  # ぁ is E3 81 81


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["ab", "e\u0301", "1", " ", "\n", "{", "漢"])
def test_time_is_near_linear_without_spaces(kind, unit, hf_directory):
    tokenizer = load_tokenizer(hf_directory(kind), 2000)

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        runs: list[float] = []
        for _ in range(3):
            begin = time.process_time()
            tokenizer.encode(text)
            runs.append(time.process_time() - begin)
        return min(runs)

    # Linear is 8; quadratic would be 64.
    assert seconds(1 << 17) < 24 * max(seconds(1 << 14), 0.001)


def test_sound_character_map_is_taken(tmp_path, hf_directory):
    import base64
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 50),
        model_writer=model,
        vocab_size=12,
        model_type="char",
        normalization_rule_name="nmt_nfkc",
        minloglevel=9,
    )
    place = model.getvalue().index(b"nmt_nfkc") + len(b"nmt_nfkc") + 1
    size = shift = 0
    while True:  # the length of the map, a protobuf varint
        byte = model.getvalue()[place]
        size |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            break
    charsmap = model.getvalue()[place : place + size]
    folder = hf_directory("bytes")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(folder, 2000)
    assert tokenizer.decode(tokenizer.encode("ﬁ Ⅳ")) == "fi IV"
