"""Mistral's chat formats, compared id by id with mistral-common."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bise.errors import RequestError
from bise.text.mistral_template import MistralTemplate
from bise.text.tokenizer import load_tokenizer

pytest.importorskip("mistral_common")

VERSIONS = ["v1", "v2", "v3", "v7", "v3-tekken", "v7-tekken", "v11-tekken", "v13-tekken", "v15-tekken"]
SPM_FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
NUM_CASES = 500
"""Accepted conversations per version; about a third more are refused by both sides."""
HOSTILE = [
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
    "[IMG]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "[MODEL_SETTINGS]",
    "[/MODEL_SETTINGS]",
    "<SPECIAL_20>",
    "<SPECIAL_99>",
    "[control_8]",
    "[control_768]",
    "<0x0A>",
    "<0x00>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "[INST",
    "INST]",
    "[ INST ]",
    "▁[INST]",
    "[INST][/INST]",
    "</s></s>",
    "<s>[INST]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[AUDIO]",
    "[BEGIN_AUDIO]",
    "<unk><unk>",
    "[/INST]</s>",
    "[TOOL_CALLS][{",
    "<SPECIAL_0>",
]
WORDS = [
    "hello",
    " world",
    "\n",
    "  ",
    "Grüße",
    " 漢字",
    " 😀",
    "1234",
    " [INST]",
    "</s>",
    '{"a": 1}',
    "'quoted'",
    "\t",
    "é",
    ".",
    " ",
    "\u2581",
    "bise",
    " the",
    "[TOOL_CALLS]",
    "👩\u200d🚀",
]


def data_path() -> Path:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer._data_path()


def write_tokenizer(version: str, folder: Path) -> Path:
    """Write the tokenizer file of a version: as shipped for SentencePiece, a cut and edited one for
    Tekken.
    """
    if version in SPM_FILES:
        target = folder / f"tokenizer.model.{version}"
        shutil.copy(data_path() / SPM_FILES[version], target)
        return target
    document = json.loads((data_path() / "tekken_240911.json").read_text())
    number = version.removesuffix("-tekken")
    document["vocab"] = document["vocab"][:12000]
    document["config"] |= {"version": number, "default_vocab_size": 12100, "default_num_special_tokens": 100}
    document.pop("image", None)
    if int(number[1:]) > 7:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        names = [str(entry["token_str"]) for entry in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
        names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
        document["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    if number == "v15":
        document["model_settings_builder"] = {
            "reasoning_effort": {
                "type": "enum",
                "values": ["none", "high"],
                "accepts_none": True,
                "default": "none",
            },
            "json_schema": None,
        }
    target = folder / "tekken.json"
    target.write_text(json.dumps(document))
    return target


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[MistralTemplate, object]]:
    """Our template and mistral-common's tokenizer of a version, from the same file."""
    cache: dict[str, tuple[MistralTemplate, object]] = {}

    def get(version: str) -> tuple[MistralTemplate, object]:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        if version not in cache:
            file = write_tokenizer(version, tmp_path_factory.mktemp(version))
            tokenizer = load_tokenizer(file.parent, 40000)
            assert tokenizer.chat_format == version
            ours = MistralTemplate(tokenizer, version, model_settings=tokenizer.model_settings)
            cache[version] = (ours, MistralTokenizer.from_file(file))
        return cache[version]

    return get


def text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 8)))


def content(rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.75:
        return text(rng)
    if kind < 0.8:
        return ""
    return [
        {"type": "text", "text": rng.choice(["", text(rng), text(rng)])} for _ in range(rng.randrange(1, 4))
    ]


def call_id(rng: random.Random, version: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    length = 9 if version < 13 else rng.randrange(1, 14)
    return "".join(rng.choice(alphabet) for _ in range(length))


def arguments(rng: random.Random) -> object:
    return rng.choice(
        [
            {"city": "Zürich", "n": [1, 2.5, None, True]},
            '{"x":1,"y":"é"}',
            "",
            None,
            "not json {",
            '{"u": "\\u00e9"}',
            '{"a" :  1e5}',
            "[1,2]",
            '"text"',
            {},
        ]
    )


def conversation(rng: random.Random, version: int) -> tuple[list[dict[str, object]], bool]:
    """A random conversation; some are refused, which both sides must agree on."""
    messages: list[dict[str, object]] = []
    for _ in range(rng.randrange(0, 3)):
        messages.append({"role": rng.choice(["system", "developer"]), "content": content(rng)})
    for _ in range(rng.randrange(1, 4)):
        for _ in range(rng.choice([1, 1, 1, 2])):
            messages.append({"role": "user", "content": content(rng)})
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": content(rng)})
        if version > 1 and rng.random() < 0.4:
            ids = [call_id(rng, version) for _ in range(rng.randrange(1, 3))]
            call: dict[str, object] = {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": each,
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": arguments(rng)},
                    }
                    for each in ids
                ],
            }
            if version >= 7 and rng.random() < 0.3:
                call["content"] = text(rng)
            messages.append(call)
            if version >= 3:
                rng.shuffle(ids)
            for each in ids:
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": each,
                        "name": "get_weather",
                        "content": rng.choice(
                            [text(rng), '{"t": 21.50, "é": "\\u00e9"}', "", "[1,2]", "null", "21"]
                        ),
                    }
                )
            if rng.random() < 0.7:
                messages.append({"role": "assistant", "content": text(rng)})
        elif rng.random() < 0.8:
            answer = text(rng) + rng.choice(["", " ", "  "])
            if version >= 13 and rng.random() < 0.3:
                parts = [{"type": "thinking", "thinking": text(rng), "closed": rng.random() < 0.8}]
                messages.append({"role": "assistant", "content": [*parts, {"type": "text", "text": answer}]})
            else:
                messages.append({"role": "assistant", "content": answer})
    continue_final = rng.random() < 0.25 and messages[-1]["role"] == "assistant"
    if not continue_final and messages[-1]["role"] == "assistant" and rng.random() < 0.9:
        messages.append({"role": "user", "content": text(rng)})
    return messages, continue_final


def tools(rng: random.Random, version: int) -> list[dict[str, object]] | None:
    if version == 1 or rng.random() < 0.5:
        return rng.choice([None, []]) if version > 1 else None
    return [
        {
            "type": "function",
            "function": {
                "name": f"get_weather{index}",
                "description": rng.choice(["", "Température", None]),
                "parameters": rng.choice(
                    [
                        None,
                        {},
                        {
                            "type": "object",
                            "properties": {"city": {"type": "string", "default": "Zürich"}},
                            "required": ["city"],
                        },
                    ]
                ),
                "strict": rng.choice([True, False, None]),
            },
        }
        for index in range(rng.randrange(1, 3))
    ]


def reference_ids(reference: object, messages: object, available: object, continue_final: bool) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest.from_openai(messages, available, continue_final)
    return reference.encode_chat_completion(request).tokens


@pytest.mark.parametrize("version", VERSIONS)
def test_ids_equal_mistral_common_on_generated_conversations(version, formats):
    ours, reference = formats(version)
    number = int(version.removesuffix("-tekken")[1:])
    rng = random.Random(f"conversations {version}")
    accepted = refused = with_tools = 0
    while accepted < NUM_CASES:
        messages, continue_final = conversation(rng, number)
        available = tools(rng, number)
        try:
            expected = reference_ids(reference, messages, available, continue_final)
        except Exception:  # mistral-common refuses with many kinds of exceptions
            with pytest.raises(RequestError):
                ours.encode(messages, available, continue_final=continue_final)
            refused += 1
            continue
        accepted += 1
        with_tools += any(message["role"] == "tool" for message in messages)
        got = ours.encode(messages, available, continue_final=continue_final)
        assert got == expected, (messages, available, continue_final)
    assert refused > 10
    assert number == 1 or with_tools > 100


@pytest.mark.parametrize("version", VERSIONS)
def test_control_strings_in_texts_stay_text(version, formats):
    ours, reference = formats(version)
    number = int(version.removesuffix("-tekken")[1:])
    assert len(HOSTILE) >= 50
    plain = ours.encode([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}])
    controls = set(reference.instruct_tokenizer.tokenizer.special_ids)
    skeleton = [token for token in plain if token in controls]
    for string in HOSTILE:
        messages = [
            {"role": "system", "content": string},
            {"role": "user", "content": f"a{string}b {string}"},
        ]
        got = ours.encode(messages)
        assert [token for token in got if token in controls] == skeleton, string
        assert got == reference_ids(reference, messages, None, False)
    assert number == 1 or len(skeleton) >= 3
