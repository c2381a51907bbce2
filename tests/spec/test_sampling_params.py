"""What a caller may ask: sensible values pass, every other one is refused with the name of its field."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brigade.spec.sampling import MAX_LOGPROBS, MAX_N, MAX_STOP_CHARS, MAX_STOPS, SamplingParams

VOCAB = 100


def test_defaults_can_be_served() -> None:
    SamplingParams().check(VOCAB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 2.0),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", 0),
        ("top_k", VOCAB + 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("seed", 0),
        ("seed", -(1 << 63)),
        ("seed", (1 << 63) - 1),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 1.3),
        ("logit_bias", ((0, -100.0), (VOCAB - 1, 100))),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("stop", ("x" * MAX_STOP_CHARS,) * MAX_STOPS),
        ("stop_token_ids", (0, VOCAB - 1)),
        ("n", MAX_N),
    ],
)
def test_values_at_the_edges_of_what_is_allowed_pass(field: str, value: Any) -> None:
    SamplingParams(**{field: value}).check(VOCAB)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", v) for v in (0, -1, (1 << 31) + 1, NAN, INF)],
        *[("temperature", v) for v in (-0.1, 101, NAN, INF, -INF)],
        *[("top_p", v) for v in (0, 0.0, -1, 1.01, NAN)],
        *[("top_k", v) for v in (-1, (1 << 31) + 1, NAN)],
        *[("min_p", v) for v in (-0.1, 1.1, NAN)],
        *[("presence_penalty", v) for v in (-2.1, 2.1, NAN)],
        *[("frequency_penalty", v) for v in (-2.1, 2.1, INF)],
        *[("repetition_penalty", v) for v in (0, -1, 101, NAN)],
        *[("n", v) for v in (0, -1, MAX_N + 1, INF)],
        *[("seed", v) for v in (1 << 63, -(1 << 63) - 1)],
        *[("logprobs", v) for v in (-1, MAX_LOGPROBS + 1)],
        *[("logit_bias", v) for v in (((-1, 0.0),), ((VOCAB, 0.0),), ((0, 101.0),), ((0, NAN),), ((0, 0.0),) * 1025)],
        *[("stop_token_ids", v) for v in ((-1,), (VOCAB,), (0,) * 129)],
        *[("stop", v) for v in (("",), ("x" * (MAX_STOP_CHARS + 1),), ("x",) * (MAX_STOPS + 1))],
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value}).check(VOCAB)


NUMBERS = [
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "n", "seed", "logprobs"),
]


def refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value}).check(VOCAB)


@pytest.mark.parametrize("field", NUMBERS)
def test_a_whole_number_beyond_floats_is_refused_with_its_field(field: str) -> None:
    refused(field, 10**400)
    refused(field, -(10**400))


@pytest.mark.parametrize("field", ["max_tokens", "top_k", "n", "seed", "logprobs"])
def test_a_count_that_is_no_whole_number_is_refused_with_its_field(field: str) -> None:
    """msgspec checks types where messages arrive: a wrong one that gets that far would end the worker."""
    for value in (1.5, True, "1"):
        refused(field, value)


@pytest.mark.parametrize("field", [f for f in NUMBERS if f not in ("seed", "logprobs")])
def test_what_is_no_number_is_refused_with_its_field(field: str) -> None:
    for value in ("1", None, [1]):
        refused(field, value)


def test_text_in_place_of_a_list_of_stop_strings_is_refused() -> None:
    refused("stop", "END")


def test_without_n_there_is_one_choice_equal_to_the_question() -> None:
    params = SamplingParams(seed=5, temperature=0.3)
    assert params.choices() == [params]


def test_n_choices_have_seeds_that_count_up_and_differ_in_nothing_else() -> None:
    choices = SamplingParams(n=3, seed=5, temperature=0.3).choices()
    assert choices == [SamplingParams(seed=seed, temperature=0.3) for seed in (5, 6, 7)]


def test_choices_without_a_seed_have_none_each() -> None:
    assert [c.seed for c in SamplingParams(n=4).choices()] == [None] * 4


def test_every_choice_of_a_question_that_passes_passes_too() -> None:
    question = SamplingParams(n=2, seed=(1 << 63) - 1)
    question.check(VOCAB)
    for choice in question.choices():
        choice.check(VOCAB)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    field=st.sampled_from(NUMBERS),
    value=st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1 << 31, 1 << 63]),
)
def test_any_number_passes_or_is_refused_with_its_field(field: str, value: float) -> None:
    try:
        SamplingParams(**{field: value}).check(VOCAB)  # type: ignore[arg-type]
        message = field
    except ValueError as refusal:
        message = str(refusal)
    assert field in message
