"""Routing of requests to ranks: the cheapest rank, equal ones in turn, cached prefixes within bounds, no full rank."""

import random
from dataclasses import replace

import pytest

from brigade.core.routing import (
    NewRequest,
    RankLoad,
    Weights,
    added_cost,
    choose,
    has_room,
    pairs,
    standing_cost,
)
from brigade.spec.layout import Role

W = Weights(pair=0.001, kv=0.0005)
EMPTY = RankLoad(
    rank=0, queued_tokens=0, queued_pairs=0, n_requests=0, max_requests=8, kv_tokens=0, max_kv_tokens=100_000
)
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


def idle(n_ranks: int) -> list[RankLoad]:
    return [replace(EMPTY, rank=rank) for rank in range(n_ranks)]


def of(role: Role, *loads: RankLoad) -> list[RankLoad]:
    return [replace(x, role=role) for x in loads]


def taken(load: RankLoad, request: NewRequest, cached: int = 0) -> RankLoad:
    """The load once the request waits there."""
    n = request.n_prompt - min(cached, request.n_prompt - 1)
    return replace(
        load,
        queued_tokens=load.queued_tokens + n,
        queued_pairs=load.queued_pairs + pairs(n, request.n_prompt - n),
        n_requests=load.n_requests + 1,
        kv_tokens=load.kv_tokens + request.n_prompt + 1,
    )


def drawn(rng: random.Random) -> tuple[NewRequest, list[RankLoad], dict[int, int]]:
    request = NewRequest(rng.randint(1, 5000), rng.randint(1, 500))
    loads = [
        RankLoad(
            rank=rank,
            queued_tokens=rng.choice([0, 0, rng.randrange(10_000)]),
            queued_pairs=rng.choice([0, rng.randrange(10_000_000)]),
            n_requests=rng.randint(0, 8),
            max_requests=8,
            kv_tokens=rng.choice([0, rng.randrange(30_000)]),
            max_kv_tokens=30_000,
        )
        for rank in range(rng.randint(1, 8))
    ]
    cached = {x.rank: rng.randint(0, request.n_prompt) for x in loads if rng.random() < 0.4}
    return request, loads, cached


def test_pairs_are_what_a_causal_mask_leaves() -> None:
    assert pairs(4, 0) == 8
    assert pairs(4, 10) == 48
    assert pairs(100, 0) == pytest.approx(pairs(60, 0) + pairs(40, 60))


def test_prefill_goes_by_attention_work_where_tokens_are_equal() -> None:
    long, short = replace(EMPTY, queued_tokens=100, queued_pairs=100_000), replace(EMPTY, rank=1, queued_tokens=100)
    assert choose(NewRequest(10, 1), of("prefill", long, short), weights=W) == 1
    assert choose(NewRequest(10, 1), of("prefill", long, short), weights=Weights(0, 0)) == 0


def test_decode_goes_by_kv_and_by_requests_and_not_by_queued_prompts() -> None:
    many, much = replace(EMPTY, n_requests=4), replace(EMPTY, rank=1, n_requests=2, kv_tokens=10_000)
    prompts = replace(EMPTY, rank=2, queued_tokens=10**6)
    request = NewRequest(10, 100)
    assert choose(request, of("decode", many, much), weights=W) == 0
    assert choose(request, of("decode", many, much), weights=Weights(0, 0)) == 1
    assert choose(request, of("decode", many, much, prompts), weights=W) == 2


def test_a_request_that_decodes_for_long_minds_the_batch_more_than_the_queue() -> None:
    queue, batch = replace(EMPTY, queued_tokens=500), replace(EMPTY, rank=1, n_requests=5)
    assert choose(NewRequest(10, 10), [queue, batch], weights=W) == 1
    assert choose(NewRequest(10, 1000), [queue, batch], weights=W) == 0


@pytest.mark.parametrize("role", ROLES)
def test_equal_ranks_are_taken_in_turn(role: Role) -> None:
    loads, last, seen = of(role, *idle(3)), -1, []
    for _ in range(7):
        last = choose(NewRequest(10, 10), loads, weights=W, last=last)  # type: ignore[assignment]
        seen.append(last)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_full_ranks_are_refused() -> None:
    request = NewRequest(100, 10)
    no_place = replace(EMPTY, n_requests=8)
    no_memory = replace(EMPTY, rank=1, kv_tokens=99_900)
    just_enough = replace(EMPTY, rank=2, kv_tokens=99_899, queued_tokens=10**6)
    assert choose(request, [no_place, no_memory, just_enough], weights=W) == 2
    assert choose(request, [no_place, no_memory], weights=W, cached={0: 99, 1: 99}) is None
    assert choose(request, [], weights=W) is None


def test_a_cached_prefix_draws_a_request_to_its_rank() -> None:
    loads = of("prefill", EMPTY, replace(EMPTY, rank=1, queued_tokens=300))
    assert choose(NewRequest(1000, 1), loads, weights=W, cached={1: 900}) == 1
    assert choose(NewRequest(1000, 1), loads, weights=W, cached={1: 200}) == 0
    assert choose(NewRequest(1000, 1), loads, weights=W, cached={1: 900}, bound=0) == 0


def test_requests_with_one_prefix_spill_over_to_other_ranks() -> None:
    """A hot prefix: every request has it and rank 0 has it cached; each rank that ran one has it from then on."""
    request, loads, cached, counts = NewRequest(1000, 1), of("prefill", *idle(4)), {0: 900}, [0] * 4
    loads = [replace(x, max_requests=10_000, max_kv_tokens=10**9) for x in loads]
    for _ in range(100):
        rank = choose(request, loads, weights=W, cached=cached)
        assert rank is not None
        loads[rank] = taken(loads[rank], request, cached.get(rank, 0))
        cached[rank] = max(cached.get(rank, 0), 900)
        counts[rank] += 1
    assert min(counts) >= 15
    tokens = [x.queued_tokens for x in loads]
    assert max(tokens) <= 1.5 * min(tokens)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("seed", range(20))
def test_a_cheaper_rank_is_passed_over_only_for_cached_tokens(role: Role, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        request, loads, cached = drawn(rng)
        loads = of(role, *loads)
        chosen = choose(request, loads, weights=W, cached=cached)
        room = {x.rank: standing_cost(x, request, W) for x in loads if has_room(x, request)}
        if chosen is None:
            assert not room
            continue
        assert chosen in room
        for rank, cost in room.items():
            if cost < room[chosen]:
                saved = added_cost(request, cached.get(rank, 0), role, W) - added_cost(
                    request, cached.get(chosen, 0), role, W
                )
                assert saved >= room[chosen] - cost - 1e-6


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("seed", range(20))
def test_cached_tokens_never_lead_to_a_rank_that_is_busier_than_the_bound(role: Role, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        request, loads, cached = drawn(rng)
        loads = of(role, *loads)
        bound = rng.choice([0, 0.1, 0.5, 1])
        chosen = choose(request, loads, weights=W, cached=cached, bound=bound)
        room = {x.rank: standing_cost(x, request, W) for x in loads if has_room(x, request)}
        if chosen is not None:
            ceiling = min(room.values()) + bound * added_cost(request, 0, role, W)
            assert room[chosen] <= ceiling + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_mixed_requests_keeps_ranks_within_one_request_of_each_other(seed: int) -> None:
    rng = random.Random(seed)
    loads = [replace(x, max_requests=10_000, max_kv_tokens=10**9) for x in of("prefill", *idle(6))]
    requests = [NewRequest(rng.choice([20, 200, 4000]), 1) for _ in range(200)]
    last = -1
    for request in requests:
        rank = choose(request, loads, weights=W, last=last)
        assert rank is not None
        loads[rank], last = taken(loads[rank], request), rank
    work = [standing_cost(x, requests[0], W) for x in loads]
    assert max(work) - min(work) <= max(added_cost(r, 0, "prefill", W) for r in requests)


def test_ranks_of_different_roles_share_by_what_a_request_costs_there() -> None:
    """A decode rank need not compute the prompt, so a mixed one gets a request when the other has that much more."""
    decode, mixed = replace(EMPTY, role="decode"), replace(EMPTY, rank=1)
    long, short = NewRequest(2000, 100), NewRequest(50, 100)
    assert choose(long, [decode, mixed], weights=W) == 0
    decode = replace(decode, n_requests=3)
    assert choose(long, [decode, mixed], weights=W) == 0
    assert choose(short, [decode, mixed], weights=W) == 1


@pytest.mark.parametrize("values", [(-1, 0), (0, float("nan")), (float("inf"), 0)])
def test_weights_that_are_not_costs_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="pair and kv"):
        Weights(*values)


def test_a_bound_or_request_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bound"):
        choose(NewRequest(1, 1), idle(1), weights=W, bound=1.5)
    with pytest.raises(ValueError, match="n_prompt and n_new"):
        NewRequest(0, 1)
