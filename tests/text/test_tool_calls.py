"""Tool calls: read whole, as mistral-common writes them, in linear time, and never run."""

import json
import re
import time

import pytest

from bise.errors import RequestError
from bise.text.tool_calls import CallForm, CallReader, call_form, make_call_id

NAMES = {"[TOOL_CALLS]": 256, "[CALL_ID]": 257, "[ARGS]": 258}


class Letters:
    """Bytes, and the control tokens of calls."""

    def __init__(self, *names: str) -> None:
        self._names = {name: NAMES[name] for name in names or NAMES}

    def control_id(self, name: str) -> int | None:
        return self._names.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def tokens(text: str) -> list[int]:
    """Return the tokens of a text in which control tokens are spelled out."""
    parts = re.split(r"(\[TOOL_CALLS\]|\[CALL_ID\]|\[ARGS\])", text)
    return [token for part in parts for token in ([NAMES[part]] if part in NAMES else part.encode())]


def read(form: CallForm, text: str, *, forced: bool = False, size: int = 1):
    reader = CallReader(form, Letters(), seed=3, forced=forced)
    shown, calls, broken = "", [], ""
    ids = tokens(text)
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        step = reader.push(piece, bytes(token for token in piece if token < 256).decode())
        shown, calls, broken = shown + step.text, [*calls, *step.calls], broken + step.broken
    step = reader.finish()
    return shown + step.text, [*calls, *step.calls], broken + step.broken


WRITTEN = {
    CallForm.LIST: 'Hi[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}, '
    '{"name": "h", "arguments": {}}]',
    CallForm.LIST_WITH_IDS: 'Hi[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcDEF123"}, '
    '{"name": "g", "arguments": {}}, {"name": "h", "arguments": {}}]',
    CallForm.NAMED_WITH_IDS: 'Hi[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}'
    "[TOOL_CALLS]h[ARGS]{}",
    CallForm.NAMED: 'Hi[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}[TOOL_CALLS]h[ARGS]{}',
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("form", WRITTEN)
def test_text_and_calls_are_told_apart_however_the_tokens_come(form, size):
    text, calls, broken = read(form, WRITTEN[form], size=size)
    assert (text, broken) == ("Hi", "")
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("f", {"a": 1}),
        ("g", {}),
        ("h", {}),
    ]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.id) for call in calls)
    assert (calls[0].id == "abcDEF123") == (form in (CallForm.LIST_WITH_IDS, CallForm.NAMED_WITH_IDS))


def test_a_bare_list_is_read_where_calls_were_demanded_and_is_text_elsewhere():
    written = '[{"name": "f", "arguments": {}}]'
    assert read(CallForm.BARE, written, forced=True)[1][0].name == "f"
    assert read(CallForm.BARE, written)[0] == written


@pytest.mark.parametrize(
    "written",
    ["[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS][]", "[TOOL_CALLS]__import__('os')[ARGS]{}", "[TOOL_CALLS]f",
     '[TOOL_CALLS]f[ARGS]{"a": NaN}', "[TOOL_CALLS][ARGS]{}"],
)  # fmt: skip
def test_what_is_no_call_is_handed_back_as_it_stands(written):
    _, calls, broken = read(CallForm.NAMED, written)
    assert calls == []
    assert broken == re.sub(r"\[[A-Z_]+\]", "", written)


def test_ids_depend_on_seed_place_and_content_alone():
    made = make_call_id(1, 0, "f", "{}")
    assert made == make_call_id(1, 0, "f", "{}")
    assert (
        len(
            {
                made,
                make_call_id(2, 0, "f", "{}"),
                make_call_id(1, 1, "f", "{}"),
                make_call_id(1, 0, "g", "{}"),
            }
        )
        == 4
    )


@pytest.mark.parametrize("form", [*WRITTEN, CallForm.BARE])
@pytest.mark.parametrize(
    "part",
    ["[", '{"a":', '[{"name":"f","arguments":{}},', '"\\', "9", '{"name":"f","arguments":{"a":[', "\\u0000"],
)
def test_a_hostile_mebibyte_takes_linear_time(form, part):
    def cost(length: int) -> float:
        best = 1e9
        for _ in range(3):
            reader = CallReader(form, Letters(), forced=True)
            data = (part * (length // len(part) + 1))[:length].encode()
            reader.push([256, 102, 258, *data[:4096]], "")
            reader._segments[-1].data += data
            start = time.thread_time()
            reader.finish()
            best = min(best, time.thread_time() - start)
        return best

    small, large = cost(1 << 19), cost(1 << 20)
    assert large < max(2.3 * small, 0.1)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("v2", CallForm.LIST),
        ("v3", CallForm.LIST_WITH_IDS),
        ("v3-tekken", CallForm.LIST_WITH_IDS),
        ("v7-tekken", CallForm.LIST_WITH_IDS),
        ("v11-tekken", CallForm.NAMED_WITH_IDS),
        ("v13-tekken", CallForm.NAMED),
        ("v15-tekken", CallForm.NAMED),
    ],
)
def test_each_chat_format_has_its_form(name, form):
    assert call_form(name, Letters()) is form


def test_a_jinja_template_is_told_by_the_tokens_of_its_vocabulary():
    assert call_form("jinja", Letters("[TOOL_CALLS]")) is CallForm.LIST_WITH_IDS
    assert call_form("jinja", Letters("[TOOL_CALLS]", "[ARGS]")) is CallForm.NAMED
    assert call_form("jinja", Letters()) is CallForm.NAMED_WITH_IDS
    assert call_form("v7", Letters("[ARGS]")) is CallForm.BARE


def test_v1_knows_no_tools():
    with pytest.raises(RequestError, match="v1 knows no tools"):
        call_form("v1", Letters())
