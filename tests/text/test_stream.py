"""Text of a growing sequence: for any split into pushes the text equals the whole, cut at the first stop
string.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bise.errors import RequestError
from bise.text.pieces import PieceTokenizer
from bise.text.stream import TextStream


def tokenizer_of(pieces: list[bytes], *, space_prefix: bool = False) -> PieceTokenizer:
    return PieceTokenizer(
        pieces=pieces,
        control_strings=(),
        bos_id=None,
        adds_bos=False,
        stop_ids=frozenset(),
        space_prefix=space_prefix,
        encoder=lambda text, start: [],
    )


def streamed(stream: TextStream, ids: list[int], cuts: list[int]) -> list[str]:
    parts: list[str] = []
    place = 0
    for size in [*cuts, len(ids)]:
        parts.append(stream.push(ids[place : place + size]))
        place += size
    return [*parts, stream.finish()]


# Bytes of a, b, space, é, 😀 cut anywhere, an invalid byte, and a control token (empty).
PIECES = [
    b"a",
    b"b",
    b" ",
    b"ab",
    b"aab",
    "é".encode(),
    b"\xc3",
    b"\xa9",
    "😀".encode()[:2],
    "😀".encode()[2:],
    b"\xff",
    b"",
    b" a",
    b"ba",
]
STOPS = ["a", "ab", "aab", "ba", "é", "b a", "aaa", "\ufffd", "😀", " ", "abab", "baab"]


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=24),
    cuts=st.lists(st.integers(0, 4), max_size=24),
    stops=st.lists(st.sampled_from(STOPS), max_size=3),
    space_prefix=st.booleans(),
)
def test_any_split_shows_the_text_up_to_the_first_stop(ids, cuts, stops, space_prefix):
    tokenizer = tokenizer_of(PIECES, space_prefix=space_prefix)
    whole = tokenizer.decode(ids)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    stream = TextStream(tokenizer, stops)
    parts = streamed(stream, ids, cuts)
    assert "".join(parts) == whole[: min(places, default=len(whole))]
    if places:
        assert stream.stopped is not None
        assert whole.find(stream.stopped) == min(places)
    else:
        assert stream.stopped is None


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=24))
def test_text_shown_never_has_to_be_taken_back(ids):
    tokenizer = tokenizer_of(PIECES)
    stream = TextStream(tokenizer, ["abab"])
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += stream.push([token_id])
        assert tokenizer.decode(ids[: count + 8]).startswith(shown.rstrip("\ufffd"))
        assert "abab" not in shown


def test_half_a_character_is_held_back():
    stream = TextStream(tokenizer_of(["😀".encode()[:3], "😀".encode()[3:]]))
    assert stream.push([0]) == ""
    assert stream.push([1]) == "😀"


def test_half_a_stop_string_is_held_back_and_shown_when_it_goes_on_differently():
    stream = TextStream(tokenizer_of([b"Hi #", b"1 ##", b"# x"]), ["###"])
    assert [stream.push([0]), stream.push([1]), stream.push([2])] == ["Hi ", "#1 ", ""]
    assert stream.stopped == "###"
    assert stream.push([0]) == ""
    assert stream.finish() == ""


def test_earlier_stop_string_wins_over_one_that_completes_sooner():
    stream = TextStream(tokenizer_of([b"x", b"a", b"b", b"c"]), ["b", "abc"])
    assert stream.push([0, 1, 2]) == "x"
    assert stream.stopped is None
    assert stream.push([3]) == ""
    assert stream.stopped == "abc"


def test_incomplete_character_at_the_end_becomes_a_replacement():
    stream = TextStream(tokenizer_of([b"a\xc3"]))
    assert stream.push([0]) + stream.finish() == "a\ufffd"


def test_dummy_prefix_is_dropped_at_a_start_and_kept_in_a_continuation():
    tokenizer = tokenizer_of([b"", b" the", b" wind"], space_prefix=True)
    start, continuation = TextStream(tokenizer), TextStream(tokenizer, continuation=True)
    assert start.push([0, 1, 2]) == "the wind"
    assert continuation.push([0, 1, 2]) == " the wind"


def test_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match=r"stop\[1\]"):
        TextStream(tokenizer_of([b"a"]), ["x", ""])


def test_time_is_linear_in_text_and_stop_length(quickest):
    tokenizer = tokenizer_of([b"a"])

    def push(count: int) -> None:
        stream = TextStream(tokenizer, ["a" * 50_000 + "b"])
        for _ in range(count):
            stream.push([0])

    bound = 8 * max(quickest(lambda: push(30_000), 0.0), 0.01)  # 4 times if linear, 16 if quadratic
    assert quickest(lambda: push(120_000), bound) < bound
