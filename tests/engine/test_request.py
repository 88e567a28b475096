"""Request values: every range of the docstrings is kept, every refusal names its field."""

import math

import pytest

from bise.engine.request import Request, SamplingParams
from bise.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 5.1),
        ("temperature", math.nan),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("typical_p", 0.0),
        ("typical_p", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 10**400),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"5": 1}),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", 1.0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("stop", ("",)),
        ("stop", "text"),
        ("stop", (5,)),
        ("ignore_eos", "no"),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(RequestError, match="min_tokens must be a whole number from 0 to 3, got 4"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_the_ends_of_every_range_are_accepted():
    SamplingParams(temperature=0, top_p=1, min_p=1, typical_p=1e-9, presence_penalty=-2, seed=(1 << 64) - 1)
    SamplingParams(
        temperature=5, top_k=10**9, frequency_penalty=2, repetition_penalty=100, logprobs=20, max_tokens=0
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_s", -1),
        ("deadline_s", math.nan),
        ("deadline_s", "5"),
        ("truncate", "newest"),
        ("truncate_keep", -1),
        ("adapter", ""),
        ("adapter", 3),
        ("pooling", "max"),
    ],
)
def test_a_request_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field) as caught:
        Request(token_ids=(1,), params=SamplingParams(max_tokens=1), **{field: value})
    assert caught.value.field == field


def test_truncating_needs_to_know_the_room_and_leaves_prompt_log_probs_alone():
    with pytest.raises(RequestError, match="truncate needs max_tokens"):
        Request(token_ids=(1,), truncate="oldest")
    with pytest.raises(RequestError, match="truncate cannot drop"):
        Request(token_ids=(1,), params=SamplingParams(max_tokens=1), prompt_logprobs=True, truncate="middle")


def test_a_vector_comes_without_tokens_and_without_prompt_log_probs():
    with pytest.raises(RequestError, match="max_tokens must be 0"):
        Request(token_ids=(1,), params=SamplingParams(max_tokens=1), pooling="mean")
    with pytest.raises(RequestError, match="send two"):
        Request(token_ids=(1,), params=SamplingParams(max_tokens=0), pooling="last", prompt_logprobs=True)
    Request(token_ids=(1,), params=SamplingParams(max_tokens=0), pooling="last")
