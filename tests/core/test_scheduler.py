"""The scheduler, example by example: what a step holds, who waits for whom, and who gives way."""

from typing import Any

import pytest

from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import LAST, Scheduler, Slice, StepPlan
from tests.core.fake_rank import FakeRank, check_state


def make(n_pages: int = 64, page: int = 4, max_step_tokens: int = 64, max_running: int = 8) -> Scheduler:
    return Scheduler(PagePool(n_pages, page), max_step_tokens=max_step_tokens, max_running=max_running)


def prompt(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(s.rid, s.start, s.end, s.sample) for s in plan.slices]


def say(plan: StepPlan, *tokens: int) -> dict[int, list[int]]:
    return {s.rid: list(tokens or (99,)) for s in plan.slices if s.sample}


def step(sched: Scheduler, token: int = 99) -> list[tuple[int, int, int, bool]]:
    plan = sched.plan()
    for request in sched.commit(plan, say(plan, token)):
        sched.release(request)
    return shape(plan)


# Requests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "max_new"), [([], 1), ([1], 0), ([1], -3)])
def test_a_request_without_tokens_or_without_an_end_is_refused(tokens: list[int], max_new: int) -> None:
    with pytest.raises(ValueError, match="request 7"):
        Request(7, tokens, max_new)


def test_a_request_ends_at_its_length_or_at_a_stop_token_that_it_said_itself() -> None:
    request = Request(1, [5, 9], max_new=2, stop_ids=frozenset({9}))
    assert request.finish is None  # the 9 of the prompt does not count
    request.tokens.append(3)
    assert request.finish is None
    request.tokens.append(4)
    assert request.finish == "length"
    request.tokens[-1] = 9
    assert request.finish == "stop"


def test_requests_made_from_one_prompt_do_not_share_its_tokens() -> None:
    tokens = prompt(3)
    sched = make()
    for rid in range(2):
        sched.add(Request(rid, tokens, max_new=2))
    step(sched, 50)
    assert tokens == prompt(3)


@pytest.mark.parametrize(("max_step_tokens", "max_running"), [(0, 1), (1, 0)])
def test_limits_of_nothing_are_refused(max_step_tokens: int, max_running: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make(max_step_tokens=max_step_tokens, max_running=max_running)


def test_a_request_that_could_never_run_is_refused_at_once() -> None:
    sched = make(n_pages=2, page=4)
    with pytest.raises(ValueError, match="needs 3 pages; the cache has 2"):
        sched.add(Request(1, prompt(8), max_new=2))
    sched.add(Request(1, prompt(8), max_new=1))
    assert step(sched) == [(1, 0, 8, True)]


def test_a_request_that_is_known_already_is_refused() -> None:
    sched = make()
    sched.add(Request(1, prompt(3), max_new=2))
    with pytest.raises(ValueError, match="already known"):
        sched.add(Request(1, prompt(3), max_new=2))


# Steps ---------------------------------------------------------------------------------------------------------------


def test_without_requests_the_plan_is_empty() -> None:
    sched = make()
    assert not sched.busy
    assert not sched.plan()
    assert sched.commit(StepPlan(), {}) == []


def test_a_prompt_runs_at_once_and_then_one_token_a_step() -> None:
    sched = make(page=4)
    sched.add(Request(1, prompt(5), max_new=3))
    first = sched.plan()
    assert first == StepPlan((Slice(1, (0, 1, 2, 3, 4), 0, (0, 1), True, prompt_end=4),))
    assert sched.commit(first, {1: [50]}) == []
    second = sched.plan()
    assert second == StepPlan((Slice(1, (50,), 5, (0, 1), True, prompt_end=4),))
    assert sched.commit(second, {1: [51]}) == []
    third = sched.plan()
    finished = sched.commit(third, {1: [52]})
    assert [r.tokens for r in finished] == [[*prompt(5), 50, 51, 52]]
    assert not sched.busy


def test_a_step_planned_ahead_stands_for_the_token_that_is_not_known_yet() -> None:
    sched = make()
    sched.add(Request(1, prompt(5), max_new=9))
    plans = [sched.plan() for _ in range(3)]
    assert [s.tokens for p in plans for s in p.slices] == [tuple(prompt(5)), (LAST,), (LAST,)]
    assert [s.start for p in plans for s in p.slices] == [0, 5, 6]


def test_planning_ahead_stops_at_the_last_token() -> None:
    sched = make()
    sched.add(Request(1, prompt(5), max_new=2))
    plans = [sched.plan() for _ in range(3)]
    assert [shape(p) for p in plans] == [[(1, 0, 5, True)], [(1, 5, 6, True)], []]
    assert sched.commit(plans[0], {1: [50]}) == []
    assert [r.tokens[5:] for r in sched.commit(plans[1], {1: [51]})] == [[50, 51]]


def test_a_long_prompt_runs_in_chunks_and_only_the_last_one_samples() -> None:
    sched = make(max_step_tokens=4)
    sched.add(Request(1, prompt(10), max_new=1))
    assert [step(sched) for _ in range(3)] == [[(1, 0, 4, False)], [(1, 4, 8, False)], [(1, 8, 10, True)]]
    assert not sched.busy


def test_running_requests_come_before_waiting_ones_and_older_before_younger() -> None:
    sched = make(max_step_tokens=6)
    for rid in range(3):
        sched.add(Request(rid, prompt(4, 10 * rid), max_new=4))
    assert step(sched) == [(0, 0, 4, True), (1, 0, 2, False)]
    assert step(sched) == [(0, 4, 5, True), (1, 2, 4, True), (2, 0, 3, False)]
    assert step(sched) == [(0, 5, 6, True), (1, 4, 5, True), (2, 3, 4, True)]


def test_a_decode_never_waits_for_the_prompts_of_others() -> None:
    sched = make(n_pages=200, max_step_tokens=8)
    sched.add(Request(0, prompt(4), max_new=20))
    step(sched)
    for rid in range(1, 6):
        sched.add(Request(rid, prompt(50, 100 * rid), max_new=2))
    for i in range(15):
        assert step(sched)[0] == (0, 4 + i, 5 + i, True)


def test_no_more_than_max_running_requests_run() -> None:
    sched = make(max_running=2)
    for rid in range(3):
        sched.add(Request(rid, prompt(3, 10 * rid), max_new=2))
    assert [s[0] for s in step(sched)] == [0, 1]
    assert [s[0] for s in step(sched)] == [0, 1]
    assert [s[0] for s in step(sched)] == [2]


def test_equal_histories_give_equal_plans() -> None:
    def plans() -> list[StepPlan]:
        sched, out = make(n_pages=9, max_step_tokens=7), []
        for rid in range(5):
            sched.add(Request(rid, prompt(6, rid), max_new=5))
        while sched.busy:
            out.append(sched.plan())
            for request in sched.commit(out[-1], say(out[-1])):
                sched.release(request)
        return out

    assert plans() == plans()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_position_is_computed_twice_or_for_nothing(depth: int) -> None:
    sched, pending = make(n_pages=64, max_step_tokens=5), list[StepPlan]()
    requests = [Request(i, prompt(3 + i, 100 * i), max_new=4) for i in range(5)]
    positions = dict[int, list[int]]()
    for request in requests:
        sched.add(request)
    while sched.busy or any(pending):
        pending.append(sched.plan())
        for s in pending[-1].slices:
            positions.setdefault(s.rid, []).extend(range(s.start, s.end))
        if len(pending) == depth:
            plan = pending.pop(0)
            for request in sched.commit(plan, say(plan)):
                sched.release(request)
    assert sched.n_preempted == 0
    assert positions == {r.rid: list(range(r.n_prompt + r.max_new - 1)) for r in requests}


# Prefix reuse --------------------------------------------------------------------------------------------------------


def finish(sched: Scheduler, request: Request, token: int = 99) -> Request:
    sched.add(request)
    while sched.busy:
        step(sched, token)
    return request


def test_the_full_pages_of_a_known_prefix_are_not_computed_again() -> None:
    sched = make(page=4)
    assert finish(sched, Request(1, prompt(11), max_new=1)).n_cached == 0
    sched.add(second := Request(2, [*prompt(9), 77, 78], max_new=1))
    assert step(sched) == [(2, 8, 11, True)]
    assert second.n_cached == 8


def test_of_an_identical_prompt_the_last_token_is_computed_again() -> None:
    sched = make(page=4)
    finish(sched, Request(1, prompt(8), max_new=1))
    assert finish(sched, Request(2, prompt(8), max_new=1)).n_cached == 4
    assert finish(sched, Request(3, prompt(9), max_new=1)).n_cached == 8


def test_the_next_turn_of_a_chat_finds_the_answer_to_the_last_one() -> None:
    sched = make(page=4)
    first = finish(sched, Request(1, prompt(6), max_new=7))  # positions 0..11 were computed: three pages
    assert finish(sched, Request(2, [*first.tokens, 7, 7], max_new=1)).n_cached == 12


@pytest.mark.parametrize("depth", [2, 3])
def test_the_next_turn_finds_the_answer_also_when_steps_were_planned_ahead(depth: int) -> None:
    sched, pending = make(page=4), list[StepPlan]()
    sched.add(first := Request(1, prompt(6), max_new=7))
    while sched.busy:
        pending.append(sched.plan())
        if len(pending) == depth:
            plan = pending.pop(0)
            for request in sched.commit(plan, say(plan)):
                sched.release(request)
    assert finish(sched, Request(2, [*first.tokens, 7, 7], max_new=1)).n_cached == 12


def test_a_slice_says_where_the_whole_pages_of_its_prompt_end() -> None:
    for n, end in ((1, 0), (4, 0), (5, 4), (8, 4), (9, 8)):
        sched = make(page=4, max_step_tokens=3)
        sched.add(Request(1, prompt(n), max_new=6))
        ends = set[int]()
        while sched.busy:
            plan = sched.plan()
            ends |= {s.prompt_end for s in plan.slices}
            sched.commit(plan, say(plan))
        assert ends == {end}, n


def test_where_answers_are_not_shared_the_next_turn_finds_the_whole_pages_of_the_last_prompt() -> None:
    sched = Scheduler(PagePool(64, 4), max_step_tokens=64, max_running=8, share_answers=False)
    request = Request(1, prompt(10), max_new=12)
    sched.add(request)
    while sched.busy:
        step(sched)
    sched.add(Request(2, [*request.tokens, 7], max_new=1))
    assert shape(sched.plan()) == [(2, 8, 23, True)]


def test_where_answers_are_not_shared_a_prompt_does_not_stand_for_an_answer() -> None:
    """A longer prompt holds what a preempted request has said, but in another form."""
    sched = Scheduler(PagePool(64, 4), max_step_tokens=64, max_running=8, share_answers=False)
    request = Request(1, prompt(10), max_new=12)
    request.tokens += [99] * 8
    sched.add(Request(2, [*request.tokens, 99, 99], max_new=1))
    step(sched)
    sched.add(request)
    assert shape(sched.plan()) == [(1, 8, 18, True)]


def test_tenants_with_different_salts_never_share_pages() -> None:
    sched = make(page=4)
    sched.add(Request(1, prompt(9), max_new=9, salt="a"))
    sched.add(Request(2, prompt(9), max_new=9, salt="b"))
    sched.add(Request(3, prompt(9), max_new=9))
    sched.add(same := Request(4, prompt(9), max_new=9, salt="a"))
    tables = {s.rid: set(s.pages) for s in sched.plan().slices}
    assert not tables[1] & tables[2]
    assert not (tables[1] | tables[2]) & tables[3]
    assert len(tables[1] & tables[4]) == 2
    assert same.n_cached == 8


def test_a_request_shares_pages_that_an_earlier_slice_of_the_same_step_fills() -> None:
    sched = make(page=4, max_step_tokens=64)
    for rid in range(4):
        sched.add(Request(rid, prompt(10), max_new=2))
    plan = sched.plan()
    assert shape(plan) == [(0, 0, 10, True), *[(rid, 8, 10, True) for rid in (1, 2, 3)]]
    assert len({s.pages[:2] for s in plan.slices}) == 1
    assert len({s.pages[2] for s in plan.slices}) == 4
    assert sched.pool.refs.count(4) == 2


def test_pages_that_no_step_has_filled_yet_are_not_shared() -> None:
    sched = make(page=4, max_step_tokens=6)
    sched.add(Request(0, prompt(12), max_new=1))
    sched.add(late := Request(1, prompt(12), max_new=1))
    assert step(sched) == [(0, 0, 6, False)]
    assert step(sched) == [(0, 6, 12, True)]
    assert step(sched) == [(1, 8, 12, True)]
    assert late.n_cached == 8


def test_what_is_cached_is_counted_when_a_request_first_runs() -> None:
    sched = make(n_pages=6, page=1)
    sched.add(Request(0, [1, 2], max_new=5))
    sched.add(victim := Request(1, [3, 4], max_new=5))
    while not sched.n_preempted:
        step(sched)
    while sched.busy:
        step(sched)
    assert victim.n_cached == 0


# Priorities ----------------------------------------------------------------------------------------------------------


def test_lower_priorities_are_admitted_first_and_equal_ones_as_they_came() -> None:
    sched = make(max_running=1)
    for rid, priority in enumerate((0, 5, -1, 5, 0)):
        sched.add(Request(rid, prompt(2, 10 * rid), max_new=1, priority=priority))
    assert [step(sched)[0][0] for _ in range(5)] == [2, 0, 4, 1, 3]


def test_the_least_urgent_request_gives_way_however_old_it_is() -> None:
    sched = crowd(n_pages=5, n=0, max_new=7)
    sched.add(Request(0, prompt(2), max_new=7, priority=1))
    step(sched)
    sched.add(Request(1, prompt(2, 10), max_new=7))
    while not sched.n_preempted:
        step(sched)
    assert [r.rid for r in sched.running] == [1]
    assert [r.rid for r in sched.waiting] == [0]


def test_a_preempted_request_waits_behind_more_urgent_ones() -> None:
    sched = crowd(n_pages=5, n=2, max_new=7)
    sched.max_running = 2
    step(sched)
    sched.add(Request(7, [70, 71], max_new=1, priority=-1))
    sched.add(Request(8, [80, 81], max_new=1))
    while not sched.n_preempted:
        step(sched)
    assert [r.rid for r in sched.waiting] == [7, 1, 8]


def test_an_urgent_prompt_leaves_a_token_of_each_step_to_every_decode() -> None:
    sched = make(max_step_tokens=8, page=64)
    sched.add(Request(0, prompt(2), max_new=20))
    sched.add(Request(1, prompt(2, 10), max_new=20))
    step(sched)
    sched.add(Request(2, prompt(30, 100), max_new=2, priority=-3))
    step(sched)
    assert step(sched) == [(2, 6, 12, False), (0, 3, 4, True), (1, 3, 4, True)]


def test_a_less_urgent_preempted_request_does_not_hold_up_pages_for_a_prompt_from_elsewhere() -> None:
    sched = crowd(n_pages=6, n=2, max_new=9)
    while not sched.n_preempted:
        step(sched)
    sched.abort(0)
    assert not sched.reserve(Request(8, [80], max_new=2))
    assert sched.reserve(Request(9, [90], max_new=2, priority=-1))


# Preemption ----------------------------------------------------------------------------------------------------------


def crowd(n_pages: int, n: int, max_new: int, page: int = 2) -> Scheduler:
    """`n` requests of one page of prompt each that all grow."""
    sched = make(n_pages=n_pages, page=page, max_step_tokens=64)
    for rid in range(n):
        sched.add(Request(rid, prompt(page, 10 * rid), max_new=max_new))
    return sched


def test_when_pages_run_out_the_youngest_gives_way_and_keeps_its_tokens() -> None:
    sched = crowd(n_pages=5, n=2, max_new=7)
    youngest = sched.live[1]
    while not sched.n_preempted:
        step(sched)
    assert [r.rid for r in sched.running] == [0]
    assert list(sched.waiting) == [youngest]
    assert youngest.pages == []
    n_said = len(youngest.tokens)
    assert n_said > youngest.n_prompt
    while sched.live.get(0):
        step(sched)
    assert len(youngest.tokens) == n_said
    (resumed,) = [s for s in sched.plan().slices if s.rid == 1]
    assert resumed.end == len(youngest.tokens)
    assert resumed.sample


def test_a_preempted_request_goes_before_those_that_wait() -> None:
    sched = crowd(n_pages=5, n=2, max_new=7)
    sched.add(Request(7, [70, 71], max_new=1))
    while not sched.n_preempted:
        step(sched)
    assert sched.waiting[0].rid == 1


def test_victims_wait_in_the_order_in_which_they_came() -> None:
    sched = make(n_pages=8, page=1)
    for rid in range(3):
        sched.add(Request(rid, [rid], max_new=8))
    while sched.n_preempted < 2:
        step(sched)
    assert [r.rid for r in sched.running] == [0]
    assert [r.rid for r in sched.waiting] == [1, 2]


def test_a_step_that_ran_out_of_pages_admits_nobody() -> None:
    sched = crowd(n_pages=5, n=2, max_new=7)
    while not sched.n_preempted:
        plan = sched.plan()
        sched.commit(plan, say(plan))
    assert [s.rid for s in plan.slices] == [0]


def test_a_newcomer_leaves_a_spare_page_for_each_running_request() -> None:
    sched = make(n_pages=3, page=4)
    sched.add(Request(0, prompt(4), max_new=2))
    step(sched)
    sched.add(Request(1, prompt(4, 50), max_new=2))
    sched.add(Request(2, prompt(4, 90), max_new=2))
    assert [s[0] for s in step(sched)] == [0]
    assert sched.n_preempted == 0


def test_a_request_preempted_with_a_token_on_its_way_waits_for_it() -> None:
    sched, pending = crowd(n_pages=6, n=2, max_new=9), list[StepPlan]()
    while not sched.n_preempted:
        pending.append(sched.plan())
        if len(pending) == 3 and not sched.n_preempted:
            plan = pending.pop(0)
            sched.commit(plan, say(plan))
    victim = sched.live[1]
    assert victim.inflight > 0
    sched.abort(0)
    assert not sched.plan()
    for plan in pending:
        sched.commit(plan, say(plan))
    assert victim.inflight == 0
    (again,) = sched.plan().slices
    assert again.end == len(victim.tokens)


@pytest.mark.parametrize("page", [1, 2, 4])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("stop_at", range(1, 9))
def test_a_request_may_end_by_a_token_that_was_on_its_way_when_it_was_preempted(
    depth: int, page: int, stop_at: int
) -> None:
    """It holds no pages then, so its release gives back none and publishes none."""
    sched, pending = make(n_pages=12 // page + 2, page=page), list[StepPlan]()
    for rid in range(2):
        sched.add(Request(rid, prompt(page, 10 * rid), max_new=10, stop_ids=frozenset({9})))
    while sched.busy or any(pending):
        pending.append(sched.plan())
        check_state(sched, [], pending)
        if len(pending) == depth:
            plan = pending.pop(0)
            new = {
                s.rid: [9 if s.rid == 1 and len(sched.live[1].tokens) == page + stop_at else 50]
                for s in plan.slices
                if s.sample and s.rid in sched.live
            }
            for request in sched.commit(plan, new):
                sched.release(request)
            check_state(sched, [], pending)
    assert sched.pool.n_free == sched.pool.n_pages


# Ends ----------------------------------------------------------------------------------------------------------------


def test_pages_of_a_finished_request_stay_held_until_they_are_released() -> None:
    sched = make(page=4)
    sched.add(Request(1, prompt(5), max_new=1))
    plan = sched.plan()
    (request,) = sched.commit(plan, {1: [9]})
    assert not sched.busy
    assert sched.pool.n_free == 62
    sched.release(request)
    assert sched.pool.n_free == 64
    assert request.pages == []


def test_releasing_twice_gives_nothing_back_twice() -> None:
    sched = make(page=4)
    request = finish(sched, Request(1, prompt(5), max_new=3))
    sched.release(request)
    assert sched.pool.n_free == 64


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_late_end_of_sequence_costs_at_most_the_steps_in_flight(depth: int) -> None:
    sched, pending, n_computed = make(page=2), list[StepPlan](), 0
    sched.add(request := Request(1, prompt(3), max_new=20, stop_ids=frozenset({9})))
    said = 0
    while sched.busy or any(pending):
        pending.append(sched.plan())
        n_computed += pending[-1].n_tokens
        if len(pending) == depth or not sched.busy:
            said += 1
            for ended in sched.commit(pending.pop(0), {1: [9 if said == 4 else 50]}):
                sched.release(ended)
    assert request.tokens[3:] == [50, 50, 50, 9]
    assert n_computed == 3 + 3 + (depth - 1)
    assert sched.pool.n_free == 64


def test_aborting_what_is_not_known_is_harmless() -> None:
    sched = make()
    assert not sched.abort(1)
    finish(sched, Request(1, prompt(3), max_new=1))
    assert not sched.abort(1)


def test_a_waiting_request_can_be_aborted() -> None:
    sched = make(max_running=1)
    for rid in range(3):
        sched.add(Request(rid, prompt(3, 10 * rid), max_new=2))
    step(sched)
    assert sched.abort(1)
    assert [s[0] for s in step(sched)] == [0]
    assert [s[0] for s in step(sched)] == [2]


def test_a_request_can_be_aborted_between_two_chunks() -> None:
    sched = make(max_step_tokens=4)
    sched.add(Request(1, prompt(10), max_new=2))
    step(sched)
    assert sched.abort(1)
    assert sched.pool.n_free == 64
    assert not sched.plan()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_request_can_be_aborted_while_steps_that_have_it_run(depth: int) -> None:
    sched = make()
    for rid in range(2):
        sched.add(Request(rid, prompt(5, 10 * rid), max_new=4))
    plans = [sched.plan() for _ in range(depth)]
    assert sched.abort(0)
    assert not sched.abort(0)
    check_state(sched, [], plans)
    for plan in plans:
        assert [r.rid for r in sched.commit(plan, say(plan))] == []
    assert len(sched.live[1].tokens) == 5 + depth
    assert 0 not in sched.live


def test_a_preempted_request_can_be_aborted() -> None:
    sched = crowd(n_pages=5, n=2, max_new=7)
    while not sched.n_preempted:
        step(sched)
    assert sched.abort(1)
    while sched.busy:
        step(sched)
    assert sched.pool.n_free == 5


def test_pages_of_an_aborted_request_that_steps_still_write_serve_the_next_one() -> None:
    """The next owner writes them in a later step, so it reads its own."""
    sched, rank = make(n_pages=3, page=2), FakeRank(3, 2)
    sched.add(Request(0, [1, 2, 3], max_new=3))
    ahead = [sched.plan(), sched.plan()]
    sched.abort(0)
    sched.add(second := Request(1, [4, 4, 4], max_new=3))
    ahead.append(sched.plan())
    results = [rank.run(plan) for plan in ahead]
    for plan, new in zip(ahead, results, strict=True):
        sched.commit(plan, new)
    alone_sched, alone_rank = make(n_pages=3, page=2), FakeRank(3, 2)
    alone_sched.add(Request(1, [4, 4, 4], max_new=3))
    assert second.tokens[3:4] == alone_rank.run(alone_sched.plan())[1]


def test_many_identical_prompts_share_all_they_can() -> None:
    sched = make(n_pages=64, page=4, max_running=16)
    for rid in range(16):
        sched.add(Request(rid, prompt(17), max_new=3))
    plan = sched.plan()
    assert plan.n_tokens == 17 + 15  # one prompt, and the last token of each of the others
    assert 64 - sched.pool.n_free == 4 + 16


def test_a_plan_is_plain_and_comparable() -> None:
    def plan(**changes: Any) -> StepPlan:
        return StepPlan(
            (
                Slice(
                    **{"rid": 1, "tokens": (1,), "start": 0, "pages": (0,), "sample": True, "prompt_end": 0, **changes}
                ),
            )
        )

    assert plan() == plan()
    assert hash(plan()) == hash(plan())
    assert plan() != plan(start=1)
    assert plan()
    assert (plan().n_tokens, plan(start=4).slices[0].end) == (1, 5)
