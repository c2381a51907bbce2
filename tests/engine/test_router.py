"""Requests go to the rank that has the least to do, or that has their beginning cached."""

import random

import pytest

from brigade.core.routing import pairs
from brigade.engine.config import DEMO_MODEL
from brigade.engine.router import Room, Router, weights_of
from brigade.spec.config import read_spec

SPEC = read_spec(DEMO_MODEL)


def router(n_ranks: int = 3, max_running: int = 4) -> Router:
    return Router(SPEC, 16, [Room(max_running, 64)] * n_ranks)


def prompt(n: int, first: int = 1) -> list[int]:
    return list(range(first, first + n))


def test_equal_requests_are_dealt_out_in_turn() -> None:
    r = router()
    assert [r.place(i, prompt(20, 100 * i + 1), 8, "") for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_rank_whose_requests_ended_is_next() -> None:
    r = router()
    ranks = [r.place(i, prompt(20, 100 * i + 1), 8, "") for i in range(6)]
    r.ended(4)
    assert r.rank_of(4) is None
    assert r.place(6, prompt(20, 901), 8, "") == ranks[4]


def test_a_long_prompt_keeps_others_away_until_it_is_computed() -> None:
    r = router(2)
    assert r.place(0, prompt(400), 4, "") == 0
    assert [r.place(i, prompt(20, 500 * i), 4, "") for i in (1, 2, 3)] == [1, 1, 1]


def test_a_conversation_returns_to_the_rank_that_has_its_beginning() -> None:
    r = router()
    assert [r.place(i, prompt(200, 1000 * i), 8, "") for i in range(3)] == [0, 1, 2]
    for rid in range(3):
        r.got_token(rid)
        r.ended(rid)
    assert r.place(3, [*prompt(200, 1000), 7, 8, 9], 8, "") == 1
    assert r.place(4, [*prompt(200, 2000), 7, 8, 9], 8, "") == 2


def test_where_all_ranks_are_full_a_request_waits_on_one_of_them() -> None:
    r = router(2, max_running=1)
    assert [r.place(i, prompt(5, 10 * i + 1), 8, "") for i in range(5)] == [0, 1, 0, 1, 0]


def test_attention_weighs_more_in_a_model_with_more_layers_of_it() -> None:
    w = weights_of(SPEC)
    assert 0 < w.pair < 0.01
    assert 0 < w.kv < 0.01


def test_a_rank_that_lost_its_cache_is_not_preferred_for_what_it_had() -> None:
    r = router()
    for rid in range(3):
        r.place(rid, prompt(200, 1000 * rid), 8, "")
    r.place(3, prompt(20, 9000), 8, "")
    assert r.lost(1) == [1], "what was in flight there"
    for rid in range(4):
        r.ended(rid)
    r.place(4, prompt(5, 5000), 8, "")  # the turn goes on
    assert r.place(5, [*prompt(200, 1000), 7, 8, 9], 8, "") != 1
    r.ended(5)
    assert r.place(6, [*prompt(200, 2000), 7, 8, 9], 8, "") == 2


def test_only_ranks_that_can_be_had_now_are_chosen_and_each_by_what_it_does() -> None:
    r = router()
    assert r.place(0, prompt(20), 8, "", {2: "decode"}) == 2
    assert r.place(1, prompt(20, 500), 8, "", {1: "mixed", 2: "decode"}) == 1
    assert r.place(2, prompt(900, 1000), 1, "", {0: "decode", 2: "prefill"}) == 0, "it need not compute the prompt"
    assert r.place(3, prompt(20, 3000), 1, "", {0: "prefill", 1: "prefill"}) == 0, "prompts of others cost it nothing"


def test_each_rank_has_room_of_its_own() -> None:
    r = Router(SPEC, 16, [Room(1, 64), Room(8, 2)])
    assert r.place(0, prompt(40), 8, "") == 0, "the other one has not enough pages"
    assert r.place(1, prompt(20, 100), 8, "") == 1, "the first has no place"
    assert r.place(2, prompt(20, 200), 8, "") == 1, "both are full: the one with less to do"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_counted_of_a_rank_is_what_is_in_flight_there(seed: int) -> None:
    rng, r = random.Random(seed), router()
    for rid in range(300):
        if rng.random() < 0.5:
            r.place(rid, prompt(rng.randrange(1, 90), 100 * rid), 8, "", {0: "decode", 1: "prefill", 2: "mixed"})
        else:
            r.put(rid, rng.randrange(3), rng.randrange(1, 90))
        for _ in range(rng.randrange(4)):
            r.got_token(rng.randrange(rid + 1))
        if rng.random() < 0.9:
            r.ended(rng.randrange(rid + 1))
        for rank in range(3):
            mine = {i: x for i, x in r._in_flight.items() if x.rank == rank}
            queued = [x.n_prompt for x in mine.values() if x.computes and not x.n_new]
            load = r._load(rank, "mixed", limited=True)
            assert r.lost(rank) == list(mine)
            assert (load.n_requests, load.kv_tokens) == (len(mine), sum(x.n_prompt + x.n_new for x in mine.values()))
            assert (load.queued_tokens, load.queued_pairs) == (sum(queued), sum(pairs(n, 0) for n in queued))
    for rid in range(300):
        r.ended(rid)
    assert r._load(0, "mixed", limited=True) == router()._load(0, "mixed", limited=True)
