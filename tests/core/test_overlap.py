"""Steps are cut into halves that say the same. Whether they are is decided by what was measured, alike on all ranks."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from brigade.core.overlap import LONGEST_REST, Overlap, Way, cut
from brigade.core.scheduler import DRAFT, LAST, Slice, StepPlan


def plan(*lengths: int) -> StepPlan:
    return StepPlan(tuple(Slice(rid, tuple(range(n)), 10 * rid, (rid,), rid % 2 == 0) for rid, n in enumerate(lengths)))


def sizes(p: StepPlan) -> list[list[int]]:
    return [[len(s.tokens) for s in part.slices] for part in cut(p, 2)]


# ---- Cutting


def test_one_micro_batch_is_the_step_itself() -> None:
    p = plan(3, 1)
    assert cut(p, 1) == (p,)


@pytest.mark.parametrize(
    ("lengths", "halves"),
    [
        ([], [[], []]),
        ([1], [[1], []]),
        ([1, 1], [[1], [1]]),
        ([1, 1, 1], [[1, 1], [1]]),
        ([1] * 8, [[1] * 4, [1] * 4]),
        ([100], [[50], [50]]),
        ([1, 1, 100], [[1, 1, 49], [51]]),
        ([49, 51], [[49], [51]]),
        ([90, 10, 1], [[50], [40, 10, 1]]),
        ([1, 1, 1, 17, 1], [[1, 1, 1, 7], [10, 1]]),
    ],
)
def test_halves_have_about_as_many_tokens_and_chunks_are_cut_only_where_no_end_is_near(
    lengths: list[int], halves: list[list[int]]
) -> None:
    assert sizes(plan(*lengths)) == halves


def test_random_steps_lose_nothing_and_keep_their_order() -> None:
    rng = random.Random(1)
    for _ in range(300):
        p = plan(*(rng.choice((1, 1, 1, rng.randint(2, 60))) for _ in range(rng.randint(0, 9))))
        parts = cut(p, 2)
        tokens = [(s.rid, s.start + i, t) for part in parts for s in part.slices for i, t in enumerate(s.tokens)]
        assert tokens == [(s.rid, s.start + i, t) for s in p.slices for i, t in enumerate(s.tokens)]
        assert [s.rid for part in parts for s in part.slices if s.sample] == [s.rid for s in p.slices if s.sample]
        assert all(s.tokens for part in parts for s in part.slices)
        first, second = (part.n_tokens for part in parts)
        assert abs(first - second) <= max(1, p.n_tokens / 8)


def test_only_the_end_of_a_chunk_that_was_cut_samples() -> None:
    p = StepPlan((Slice(7, (5, 6, 7, LAST), 3, (1, 2), True, prompt_end=6),))
    head, tail = cut(p, 2)
    assert head.slices == (Slice(7, (5, 6), 3, (1, 2), False, prompt_end=6),)
    assert tail.slices == (Slice(7, (7, LAST), 5, (1, 2), True, prompt_end=6),)


def test_a_token_and_the_drafts_after_it_stay_together() -> None:
    p = StepPlan(tuple(Slice(rid, (LAST, DRAFT), 3, (rid,), True) for rid in range(3)))
    assert [[s.rid for s in part.slices] for part in cut(p, 2)] == [[0, 1], [2]]


@pytest.mark.parametrize("n", [0, 3])
def test_an_exchange_has_two_lanes(n: int) -> None:
    with pytest.raises(ValueError, match="1 to 2 micro-batches"):
        cut(plan(1, 1), n)


# ---- Deciding


Cost = Callable[[Way], float]


def run(overlap: Overlap, cost: Cost, tokens: Callable[[int], int], n_steps: int, depth: int = 1) -> list[Way]:
    """Steps whose times are heard when `depth` later ones have been chosen."""
    ways: list[Way] = []
    for step in range(n_steps):
        if step >= depth:
            overlap.learn(ways[step - depth], round(1000 * cost(ways[step - depth])))
        ways.append(overlap.choose(tokens(step)))
    return ways


def noisy(seed: int, gain: float, spread: float) -> Cost:
    """Micro-batches take `gain` times as long; everything varies, and now and then a step takes five times as long."""
    rng = random.Random(seed)

    def cost(way: Way) -> float:
        outlier = 5 if rng.random() < 0.02 else 1
        return (50 + way.n_tokens) * (gain if way.n == 2 else 1) * rng.uniform(1 - spread, 1 + spread) * outlier

    return cost


def changes(ways: list[Way]) -> int:
    usual = [way.n for way in ways if way.turn < 0]
    return sum(a != b for a, b in pairwise(usual))


@pytest.mark.parametrize("n", [1, 2])
def test_a_number_that_was_asked_for_is_kept(n: int) -> None:
    assert {way.n for way in run(Overlap(n), noisy(0, 0.5 * n, 0.1), lambda step: 32, 300)} == {n}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_it_is_taken_where_it_is_faster_and_left_where_it_is_not(depth: int) -> None:
    for gain, n in ((0.85, 2), (1.2, 1)):
        ways = run(Overlap(0), noisy(1, gain, 0.05), lambda step: 32, 2000, depth)
        assert {way.n for way in ways[200:] if way.turn < 0} == {n}


def test_trials_cost_little() -> None:
    ways = run(Overlap(0), noisy(1, 1.5, 0.02), lambda step: 32, 5000)
    assert sum(way.n == 2 for way in ways) <= 0.015 * len(ways)
    assert sum(way.n == 2 for way in ways[:1000]) <= 0.04 * 1000


@pytest.mark.parametrize("seed", range(5))
def test_where_it_makes_no_difference_it_does_not_change_to_and_fro(seed: int) -> None:
    ways = run(Overlap(0), noisy(seed, 1.0, 0.2), lambda step: 32, 20 * LONGEST_REST)
    assert changes(ways) <= 4


def test_each_size_of_step_has_a_choice_of_its_own() -> None:
    def cost(way: Way) -> float:
        return way.n_tokens * (1 if way.n == 1 else 0.8 if way.n_tokens > 100 else 1.3)

    ways = run(Overlap(0), cost, lambda step: 16 if step % 2 else 256, 1000)
    late = ways[400:]
    assert {way.n for way in late if way.n_tokens == 16 and way.turn < 0} == {1}
    assert {way.n for way in late if way.n_tokens == 256 and way.turn < 0} == {2}


def test_steps_of_unlike_size_are_not_compared() -> None:
    """Every second step is larger by half: by the times alone, the way of the smaller ones would seem faster."""
    ways = run(Overlap(0), lambda way: way.n_tokens, lambda step: 40 if step % 2 else 60, 3000)
    assert changes(ways) == 0


def test_it_learns_anew_when_the_network_gets_slower() -> None:
    overlap = Overlap(0)
    assert run(overlap, noisy(1, 1.2, 0.05), lambda step: 32, 1000)[-1].n == 1
    later = run(overlap, noisy(2, 0.7, 0.05), lambda step: 32, 4000)
    assert {way.n for way in later[2000:] if way.turn < 0} == {2}


def test_steps_with_nothing_to_cut_are_not_tried() -> None:
    assert {way.n for way in run(Overlap(0), noisy(1, 0.5, 0), lambda step: step % 2, 500)} == {1}


def test_ranks_that_hear_the_same_decide_the_same() -> None:
    one, other = Overlap(0), Overlap(0)
    rng = random.Random(5)
    tokens = [rng.choice((1, 30, 32, 500)) for _ in range(3000)]
    took = noisy(3, 0.9, 0.3)
    waiting: list[Way] = []
    for n in tokens:
        if len(waiting) == 2:
            way = waiting.pop(0)
            time = round(1000 * took(way))
            one.learn(way, time)
            other.learn(way, time)
        waiting.append(one.choose(n))
        assert other.choose(n) == waiting[-1]
