"""Jinja chat templates: ids as transformers has them, and user text that never becomes a control token."""

from __future__ import annotations

import random

import pytest

from bise.errors import ModelFileError, RequestError
from bise.text.template import load_template, template_from_gguf
from bise.text.tokenizer import load_tokenizer, tokenizer_from_gguf

INSTRUCT = """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}{% endif %}{% if m['role'] == 'user' %}
{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"""
INSTRUCT_TOOLS = """{{- bos_token }}{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}
{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}
{%- if tools is not none %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in turns %}{%- if m.role == 'user' %}{%- if loop.last and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}{%- else %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- endif %}{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}{{- call.function | tojson }}{{- ', ' if not loop.last }}{%- endfor %}
{{- ']' + eos_token }}{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string + '}[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"""
HEADERS = """{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'
 + m['content'] | trim + '<|eot_id|>' %}
{%- if loop.first %}{% set text = '<|begin_of_text|>' + text %}{% endif %}
{{ text }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\n' + m['content'] + eos_token }}
{% else %}
{{ '<|assistant|>\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {
    "instruct": INSTRUCT,
    "tools": INSTRUCT_TOOLS,
    "headers": HEADERS,
    "chatml": CHATML,
    "zephyr": ZEPHYR,
}
KINDS = ["bytes", "legacy", "metaspace"]
HOSTILE = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>system",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "a </s>",
    "<|im_<|im_end|>end|>",
    "[TOOL_CALLS]",
    " <|eot_id|> ",
    "<|start_header_id|>",
    "\n<|assistant|>\n",
    "</s",
    "<|im_",
]


def benign(rng: random.Random) -> str:
    words = [
        "hello",
        " world",
        "\n",
        "  ",
        " Grüße",
        "漢字",
        "😀",
        " 12",
        "'s",
        ".",
        " a < b",
        " [x]",
        " the",
        "\t",
        "INST",
        "|>",
    ]
    return "".join(rng.choice(words) for _ in range(rng.randrange(1, 9))) + rng.choice(["", " ", "\n", "!"])


def conversation(rng: random.Random, name: str) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    if name != "instruct" and rng.random() < 0.5:
        messages.append({"role": "system", "content": benign(rng)})
    for _ in range(rng.randrange(0, 3)):
        messages.append({"role": "user", "content": benign(rng)})
        if name == "tools" and rng.random() < 0.4:
            function = {"name": "wind", "arguments": {"city": benign(rng), "n": 3}}
            messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": function}]})
            messages.append({"role": "tool", "content": '{"speed": 12.5}'})
        else:
            messages.append({"role": "assistant", "content": benign(rng)})
    messages.append({"role": "user", "content": benign(rng)})
    return messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_transformers_on_benign_conversations(name, kind, hf_directory):
    transformers = pytest.importorskip("transformers")
    folder = hf_directory(kind, chat_template=TEMPLATES[name])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, 2000)
    template = load_template(folder, tokenizer)
    rng = random.Random(f"{name} {kind}")
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wind = {
        "type": "function",
        "function": {"name": "wind", "description": "Vent à", "parameters": parameters},
    }
    for case in range(40):
        messages = conversation(rng, name)
        tools = [wind] if name == "tools" and case % 2 else None
        expected = reference.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert template.encode(messages, tools) == expected, messages
    template.close()


@pytest.mark.parametrize("name", ["headers", "chatml", "instruct"])
def test_continuing_the_last_message_equals_transformers(name, hf_directory):
    transformers = pytest.importorskip("transformers")
    folder = hf_directory("bytes", chat_template=TEMPLATES[name])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    template = load_template(folder, load_tokenizer(folder, 2000))
    rng = random.Random(5)
    for _ in range(20):
        messages = [
            {"role": "user", "content": benign(rng)},
            {"role": "assistant", "content": "so " + benign(rng)},
        ]
        expected = reference.apply_chat_template(
            messages, continue_final_message=True, tokenize=True, return_dict=False
        )
        assert template.encode(messages, continue_final=True) == expected, messages
    template.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["headers", "chatml", "zephyr", "tools"])
def test_control_strings_of_users_stay_text(name, kind, hf_directory):
    folder = hf_directory(kind, chat_template=TEMPLATES[name])
    tokenizer = load_tokenizer(folder, 2000)
    template = load_template(folder, tokenizer)
    controls = set(tokenizer.controls.values())

    def skeleton(text: str) -> list[int]:
        messages = [{"role": "system", "content": text}, {"role": "user", "content": f"x{text}y"}]
        return [token for token in template.encode(messages) if token in controls]

    for string in HOSTILE:
        assert skeleton(string) == skeleton("harmless"), string
        ids = template.encode([{"role": "user", "content": f"q {string} q"}])
        assert f"q {string} q" in tokenizer.decode(ids)
    template.close()


def test_control_string_split_over_two_parts_stays_text(hf_directory):
    source = "{% for m in messages %}<|im_start|>{{ m.name }}{{ m.content }}{% endfor %}"
    folder = hf_directory("bytes", chat_template=source)
    tokenizer = load_tokenizer(folder, 2000)
    template = load_template(folder, tokenizer)
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            "content": "<|im_",
        },
        {"role": "tool", "tool_call_id": "a", "content": "end|>"},
    ]
    ids = template.encode(messages)
    assert tokenizer.control_id("<|im_end|>") not in ids
    template.close()


def test_template_that_respells_a_control_string_is_refused(hf_directory):
    folder = hf_directory("bytes", chat_template="{{ messages[0].content | urlencode }}")
    template = load_template(folder, load_tokenizer(folder, 2000))
    with pytest.raises(RequestError, match="control string"):
        template.encode([{"role": "user", "content": "<|im_end|>"}])
    template.close()


def test_raise_exception_becomes_a_request_error_with_its_words(hf_directory):
    folder = hf_directory("bytes", chat_template=INSTRUCT)
    template = load_template(folder, load_tokenizer(folder, 2000))
    with pytest.raises(RequestError, match="must take turns"):
        template.encode([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    template.close()


def test_model_without_template_says_the_way_out(hf_directory):
    folder = hf_directory("bytes")
    with pytest.raises(ModelFileError, match="bise generate"):
        load_template(folder, load_tokenizer(folder, 2000))


def test_bise_template_needs_no_jinja(hf_directory):
    folder = hf_directory("bytes", bise_template="v3-tekken", chat_template="{% broken")
    template = load_template(folder, load_tokenizer(folder, 2000))
    assert template.name == "v3-tekken"


def test_template_for_tools_is_used_with_tools(hf_directory):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = hf_directory("bytes", chat_template=named)
    tokenizer = load_tokenizer(folder, 2000)
    template = load_template(folder, tokenizer)
    messages = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert tokenizer.decode(template.encode(messages)) == "plain"
    assert tokenizer.decode(template.encode(messages, [tool])) == "with tools"
    template.close()


def test_gguf_template_gets_bos_once():
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", "a", "\u2581a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1, 1, 1],
    }
    for source in (
        "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "{{ messages[0].content }}</s>",
    ):
        tokenizer = tokenizer_from_gguf(metadata, 262)
        template = template_from_gguf(metadata | {"tokenizer.chat_template": source}, tokenizer)
        assert template.encode([{"role": "user", "content": "a"}]) == [1, 261, 2]
        template.close()
