"""Sampling against plain-Python references, and its promise: a row depends on its own request alone."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from brigade.model.sampling import BROKEN, Choice, History, choose, noise
from brigade.spec.sampling import SamplingParams

LOGITS = [2.0, 1.5, 1.5, 0.3, 0.0, -0.4, -1.0, -3.0]


def history(prompt: list[int] | None = None, new: list[int] | None = None, **params: Any) -> History:
    h = History(SamplingParams(**{"seed": 0, **params}), prompt or [])
    for token in new or []:
        h.append(token)
    return h


def one(logits: list[float], h: History) -> Choice:
    return choose(torch.tensor([logits]), [h])[0]


def draws(logits: list[float], n: int, **params: Any) -> Counter[int]:
    """Tokens drawn with the seeds 0 .. n-1."""
    rows = [history(seed=seed, **params) for seed in range(n)]
    return Counter(c.token for c in choose(torch.tensor([logits] * n), rows))


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kept(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """Temperature, then top_k, then top_p, then min_p, each on what the one before it left; renormalised."""
    order = sorted(enumerate(softmax(logits, p.temperature)), key=lambda pair: -pair[1])
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        goal, taken, mass = p.top_p * sum(w for _, w in order), [], 0.0
        for token, w in order:
            if mass >= goal:
                break
            taken.append((token, w))
            mass += w
        order = taken
    order = [(token, w) for token, w in order if w >= p.min_p * order[0][1]]
    total = sum(w for _, w in order)
    return {token: w / total for token, w in order}


def penalised(logits: list[float], prompt: list[int], new: list[int], p: SamplingParams) -> list[float]:
    """repetition_penalty as in CTRL (prompt and new tokens), then OpenAI's two (new tokens), then logit_bias."""
    out = []
    for token, x in enumerate(logits):
        if token in prompt or token in new:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        x -= p.frequency_penalty * new.count(token) + p.presence_penalty * (token in new)
        out.append(x + dict(p.logit_bias).get(token, 0.0))
    return out


# Greedy and penalties


def test_temperature_0_takes_the_most_likely_token_and_the_first_of_equals() -> None:
    assert one(LOGITS, history(temperature=0)).token == 0
    assert one([1.0, 3.0, 3.0], history(temperature=0)).token == 1
    assert one([1.0, 3.0, 3.0], history(temperature=0, top_k=1, top_p=0.1, min_p=1.0)).token == 1


def test_no_rows_give_no_choices() -> None:
    assert choose(torch.empty(0, 5), []) == []


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 0.9},
        {"presence_penalty": -1.1},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.3},
        {"logit_bias": ((5, 3.0), (0, -100.0))},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.2,
            "logit_bias": ((3, 1.5), (1, -0.5)),
        },
    ],
)
def test_penalties_and_bias_follow_their_formulas(penalties: dict[str, Any]) -> None:
    """The whole order of tokens shows, by forbidding the best one again and again."""
    prompt, new = [0, 4, 4], [1, 5, 5, 5]
    p = SamplingParams(**penalties)
    want = penalised(LOGITS, prompt, new, p)
    row = torch.tensor([LOGITS])
    choose(row, [history(prompt, new, temperature=0, **penalties)])
    assert row[0].tolist() == pytest.approx(want, abs=1e-5)
    token = one(LOGITS, history(prompt, new, temperature=0, **penalties)).token
    assert want[token] == pytest.approx(max(want), abs=1e-5)


def test_presence_and_frequency_penalties_ignore_the_prompt_repetition_penalty_does_not() -> None:
    assert one([2.0, 1.9], history([0, 0], temperature=0, presence_penalty=2.0, frequency_penalty=2.0)).token == 0
    assert one([2.0, 1.9], history([0], temperature=0, repetition_penalty=1.2)).token == 1


def test_bias_of_100_forces_and_minus_100_forbids() -> None:
    assert draws(LOGITS, 50, logit_bias=((7, 100.0),)) == {7: 50}
    assert 0 not in draws(LOGITS, 200, logit_bias=((0, -100.0),))


# Filters and the distribution

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 3, "top_p": 0.6},
    {"top_k": 4, "top_p": 0.95, "min_p": 0.4},
    {"top_p": 0.8, "min_p": 0.17, "temperature": 1.5},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_drawn_tokens_are_the_kept_ones_in_their_proportions(params: dict[str, Any]) -> None:
    n = 3000
    want, got = kept(LOGITS, SamplingParams(**params)), draws(LOGITS, n, **params)
    assert set(got) <= set(want)
    likely = {token for token, w in want.items() if w * n > 15}
    assert likely <= set(got)
    chi2 = sum((got[t] - n * w) ** 2 / (n * w) for t, w in want.items())
    assert chi2 < 35  # 7 degrees of freedom at most: by chance once in 90 000 choices of seeds


def test_top_p_looks_at_what_top_k_left_and_min_p_comes_last() -> None:
    logits = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    # Of all: 0.4 + 0.3 < 0.72, so three tokens. Of the first two alone: 0.4/0.7 < 0.72, so two. Of top_k=1: one.
    assert set(draws(logits, 300, top_p=0.72)) == {0, 1, 2}
    assert set(draws(logits, 300, top_k=2, top_p=0.5)) == {0}
    assert set(draws(logits, 300, top_k=2, top_p=0.6)) == {0, 1}
    assert set(draws(logits, 300, top_p=0.95, min_p=0.6)) == {0, 1}


def test_the_draws_of_one_seed_along_a_text_are_as_good_as_draws_of_many_seeds() -> None:
    n = 3000
    rows = []
    for i in range(n):
        row = history(seed=42)
        row.new = [0] * i
        rows.append(row)
    got = Counter(c.token for c in choose(torch.tensor([LOGITS] * n), rows))
    assert sum((got[t] - n * w) ** 2 / (n * w) for t, w in enumerate(softmax(LOGITS))) < 35


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = [900.0, -900.0, 899.0, 0.0]
    got = draws(logits, 200, temperature=temperature)
    want = {0} if temperature < 1 else {0, 2}
    assert set(got) <= want | ({3} if temperature == 100.0 else set())
    assert got[0] > 0


def test_a_tiny_temperature_is_greedy() -> None:
    for seed in range(20):
        assert one(LOGITS, history(seed=seed, temperature=1e-6)).token == 0


# Seeds


def test_noise_is_gumbel_noise_and_a_pure_function_of_seed_position_and_token() -> None:
    tokens = torch.arange(4000)
    for seed in (0, 1, -1, (1 << 63) - 1, -(1 << 63)):
        x = noise(seed, 5, tokens)
        assert x.isfinite().all()
        assert abs(float(x.mean()) - 0.5772) < 0.08  # Euler's constant
        assert abs(float(x.std()) - 1.2825) < 0.08  # pi / sqrt(6)
        quantiles = (-(-x).exp()).exp().sort().values  # of the Gumbel distribution: evenly spread
        assert float((quantiles - (tokens + 0.5) / len(tokens)).abs().max()) < 0.03
    assert torch.equal(noise(7, 3, tokens), noise(7, 3, tokens))
    assert torch.equal(noise(7, 3, tokens)[100:200], noise(7, 3, tokens[100:200]))
    others = [noise(7, 4, tokens), noise(8, 3, tokens), noise(-7, 3, tokens)]
    assert all(float(torch.corrcoef(torch.stack([noise(7, 3, tokens), x]))[0, 1].abs()) < 0.06 for x in others)


def test_rounding_of_the_logits_does_not_change_a_draw() -> None:
    """Another batch may round a logit differently in its last bits; a thousand draws at a high temperature stay."""
    torch.manual_seed(0)
    logits = torch.randn(1000, 4096)
    nudged = logits * (1 + 1e-7 * torch.randn(1000, 4096))
    rows = [History(SamplingParams(temperature=2.0, seed=i), [1]) for i in range(1000)]
    assert choose(logits.clone(), rows) == choose(nudged, rows)


def test_equal_seeds_draw_equal_tokens() -> None:
    assert draws(LOGITS, 50) == draws(LOGITS, 50)


def test_a_row_is_chosen_alike_in_any_company() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    logits = torch.randn(12, 97)

    def rows() -> list[History]:
        r = random.Random(2)
        return [
            history(
                [r.randrange(97) for _ in range(5)],
                [r.randrange(97) for _ in range(r.randrange(6))],
                seed=i,
                temperature=r.choice((0, 0.7, 1.5)),
                top_k=r.choice((0, 5)),
                top_p=r.choice((1.0, 0.8)),
                min_p=r.choice((0.0, 0.1)),
                presence_penalty=r.choice((0.0, 1.0)),
                repetition_penalty=r.choice((1.0, 1.2)),
                logprobs=r.choice((None, 3)),
            )
            for i in range(12)
        ]

    alone = [choose(logits[i : i + 1].clone(), [h])[0] for i, h in enumerate(rows())]
    assert choose(logits.clone(), rows()) == alone
    order = rng.sample(range(12), 12)
    shuffled = choose(logits[order].clone(), [rows()[i] for i in order])
    assert shuffled == [alone[i] for i in order]


# Log-probabilities


def test_log_probabilities_are_the_models_own_whatever_changes_the_choice() -> None:
    want = [math.log(w) for w in softmax(LOGITS)]
    h = history([0], [1], temperature=0, presence_penalty=2, repetition_penalty=3, logit_bias=((6, 50.0),), logprobs=3)
    choice = one(LOGITS, h)
    assert choice.token == 6
    assert choice.logprob == pytest.approx(want[6], abs=1e-5)
    assert choice.top[0][0] == 0
    assert {t for t, _ in choice.top} == {0, 1, 2}
    assert [p for _, p in choice.top] == pytest.approx([want[0], want[1], want[2]], abs=1e-5)


def test_no_log_probabilities_unless_asked_for_and_none_of_the_others_for_0() -> None:
    assert one(LOGITS, history(temperature=0)) == Choice(0)
    choice = one(LOGITS, history(temperature=0, logprobs=0))
    assert choice.top == ()
    assert choice.logprob is not None
    assert len(one([1.0, 2.0], history(temperature=0, logprobs=20)).top) == 2


# Broken rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2, "logprobs": 2, "presence_penalty": 1.0}])
def test_numbers_that_are_not_finite_break_only_their_own_row(bad: float, params: dict[str, Any]) -> None:
    good = one(LOGITS, history(new=[1], **params))
    logits = torch.tensor([LOGITS, [0.0, bad, *LOGITS[2:]], LOGITS])
    got = choose(logits, [history(new=[1], **params) for _ in range(3)])
    assert got == [good, Choice(BROKEN), good]
