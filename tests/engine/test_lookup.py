"""Lookups find what a plain search finds; predictions are followed, left and found again."""

import random

from hypothesis import given
from hypothesis import strategies as st

from bise.engine.lookup import CATCH_UP, MAX_MATCH, NgramIndex, Prediction, Repeats


def longest_repeat(tokens: list[int]) -> int:
    """Return how long an end of `tokens` occurred before, by trying every place."""
    end = len(tokens)
    best = 0
    for place in range(2, end):
        length = 0
        while length < place and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        best = max(best, length)
    return min(best, MAX_MATCH) if best >= 2 else 0


def follow(prediction: Prediction, text: list[int]) -> None:
    for token_id in text:
        prediction.follow(token_id)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_few_candidates_are_all_compared(tokens):
    """Over so short a text no chain is longer than what is compared, so the longest repeat is found."""
    assert Repeats(tokens).match() == longest_repeat(tokens)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=200), st.integers(1, 20))
def test_a_guess_is_what_followed_the_same_tokens_before(tokens, count):
    repeats = Repeats(tokens)
    length = repeats.match()
    guess = repeats.guess(count)
    assert bool(guess) == bool(length)
    if guess:
        assert len(guess) == count
        text = tokens + guess
        places = [
            place
            for place in range(length, len(tokens))
            if text[place - length : place] == tokens[len(tokens) - length :]
            and text[place : place + count] == guess
        ]
        assert places


@given(st.lists(st.integers(0, 2), min_size=4, max_size=120), st.integers(1, 119))
def test_a_match_that_grows_with_the_text_equals_a_fresh_search_of_the_same_place(tokens, start):
    start = min(start, len(tokens))
    text = tokens[:start]
    repeats = Repeats(text)
    repeats.match()
    for token_id in tokens[start:]:
        guessed = repeats.guess(1)
        before = repeats.match()
        text.append(token_id)
        after = repeats.match()
        if guessed == [token_id]:
            assert after == min(before + 1, MAX_MATCH)


def test_a_repetition_that_reaches_the_end_goes_on_with_itself():
    repeats = Repeats([9, 9, 7, 5, 6, 5, 6, 5, 6])
    assert repeats.match() >= 2
    assert repeats.guess(5) == [5, 6, 5, 6, 5]


def test_a_long_prompt_is_indexed_over_several_calls():
    tokens = [*range(50, 60), *(1000 + random.Random(0).randrange(3000) for _ in range(2 * CATCH_UP)), 50, 51]
    repeats = Repeats(tokens)
    assert [repeats.match() for _ in range(4)] == [0, 0, 2, 2]
    assert repeats.guess(3) == [52, 53, 54]


def test_the_nearest_of_equal_places_is_found():
    text = [1, 2, 30, 1, 2, 40, 1, 2, 50]
    index = NgramIndex(text)
    assert index.extend(8)
    assert index.find([1, 2], near=8) == (8, 2)
    assert index.find([1, 2], near=2) == (2, 2)
    assert index.find([2, 1], near=2) == (-1, 0)


def test_a_prediction_that_comes_true_is_guessed_from_the_first_token_on():
    prediction = Prediction((5, 6, 7, 8))
    assert prediction.guess(3) == [5, 6, 7]
    follow(prediction, [5, 6])
    assert prediction.guess(9) == [7, 8]
    follow(prediction, [7, 8])
    assert (prediction.match(), prediction.guess(2)) == (0, [])
    assert (prediction.num_accepted, prediction.num_rejected) == (4, 0)


def test_a_prediction_is_found_again_after_words_were_replaced_left_out_and_put_in():
    predicted = list(range(100, 140))
    for output in (
        [*predicted[:10], 1, 2, *predicted[12:]],
        [*predicted[:10], *predicted[15:]],
        [*predicted[:10], 1, 2, 3, *predicted[10:]],
    ):
        prediction = Prediction(tuple(predicted))
        follow(prediction, output[:20])
        start = predicted.index(output[19]) + 1
        assert prediction.guess(4) == predicted[start : start + 4]
        follow(prediction, output[20:])
        missing = 40 - len(set(predicted) & set(output))
        # Two tokens after each divergence only serve to find back.
        assert prediction.num_rejected == missing + 2
        assert prediction.num_accepted == 40 - prediction.num_rejected


def test_two_matching_tokens_far_away_do_not_count_as_finding_back():
    prediction = Prediction((1, 2, 3, *range(10, 60), 70, 71, 72, 73))
    follow(prediction, [1, 2, 70, 71])
    assert prediction.match() == 0
    follow(prediction, [72])
    assert prediction.guess(1) == [73]


def test_a_prediction_that_never_comes_true_guesses_nothing_and_is_rejected_whole():
    prediction = Prediction((1, 2, 3, 4))
    follow(prediction, [9, 8, 7, 9, 8, 7])
    assert prediction.guess(3) == []
    assert (prediction.num_accepted, prediction.num_rejected) == (0, 4)


@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 2), max_size=60))
def test_accepted_and_rejected_are_all_of_the_prediction(predicted, output):
    prediction = Prediction(tuple(predicted))
    follow(prediction, output)
    assert prediction.num_accepted + prediction.num_rejected == len(predicted)
    assert prediction.num_accepted <= len(output)
