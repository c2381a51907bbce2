"""Plans that are taken back, as when another rank of the unit is lost in the middle of them, change no text.

Every loss is played at its worst: some of the plans in flight were run, the others left rubbish in the pages that they
were to fill. The last tests put bugs in, to see that these tests can fail.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest

from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, StepPlan
from tests.core.fake_rank import ROOT, FakeRank, Load, alone, cell, check_plan, check_state, random_load, step_bound


def spoil(rank: FakeRank, plan: StepPlan, rng: random.Random) -> None:
    """What a step that was given up half-way may leave: anything, in the places that it was to fill."""
    for s in plan.slices:
        for position in range(s.start, s.end):
            if rng.random() < 0.8:
                rank.cache[s.pages[position // rank.page]][position % rank.page] = rng.randrange(1 << 30)


def check_findable(pool: PagePool, rank: FakeRank) -> None:
    """With no plan in flight, every page that can be found holds what it is found for."""
    ends: dict[int | str, int] = {"": ROOT, "tenant": ROOT}
    for (parent, tokens), (page, node) in sorted(pool._found.items(), key=lambda item: item[1][1]):
        if parent not in ends:
            continue  # its parent was overwritten: nobody can reach it
        before = ends[parent]
        for slot, token in enumerate(tokens):
            before = cell(before, token)
            assert rank.cache[page][slot] == before, f"page {page} is found for what was never computed"
        ends[node] = before


class Losses:
    """One load on a machine on which plans are lost now and then."""

    def __init__(
        self,
        load: Load,
        rng: random.Random,
        make_scheduler: type[Scheduler] = Scheduler,
        make_pool: type[PagePool] = PagePool,
        check: bool = True,
        drafts: int = 0,
    ) -> None:
        self.load, self.rng, self.check = load, rng, check
        self.pool, self.rank = make_pool(load.n_pages, load.page), FakeRank(load.n_pages, load.page, drafts=drafts)
        limits = {"max_step_tokens": load.max_step_tokens, "max_running": load.max_running}
        self.sched = make_scheduler(self.pool, **limits, drafts=drafts)
        self.pending: deque[StepPlan] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.n_undone = 0

    def play(self) -> None:
        load, sched = self.load, self.sched
        requests = {i: Request(i, list(p), m, s, salt) for i, (p, m, s, salt) in enumerate(load.requests)}
        step, limit = 0, 3 * step_bound(load) + 50
        while step <= max(load.arrivals) or sched.busy or any(self.pending):
            assert step < limit, f"not finished after {limit} steps"
            for i, request in requests.items():
                if load.arrivals[i] == step:
                    sched.add(request)
                if load.aborts.get(i) == step and sched.abort(i):
                    self.aborted.add(i)
            before = {r.rid: r.done for r in sched.running}
            plan = sched.plan()
            if self.check:
                check_plan(sched, plan, before)
            self.pending.append(plan)
            if step < limit // 3 and self.rng.random() < 0.2:
                self.lose()
            elif len(self.pending) == load.depth:
                self.commit()
            step += 1
        assert self.pool.n_free == load.n_pages, "pages are lost"

    def commit(self) -> None:
        plan = self.pending.popleft()
        for request in self.sched.commit(plan, self.rank.run(plan)):
            self.sched.release(request)
            self.tokens[request.rid] = request.tokens

    def lose(self) -> None:
        """Some of the plans were run. The others are taken back, newest first."""
        for _ in range(self.rng.randint(0, len(self.pending))):
            self.commit()
        for plan in self.pending:
            spoil(self.rank, plan, self.rng)
        self.leave()
        while self.pending:
            self.sched.undo(self.pending.pop())
            self.n_undone += 1
            if self.check:
                check_state(self.sched, [], list(self.pending))
        if self.check:
            check_findable(self.pool, self.rank)
        self.leave()

    def leave(self) -> None:
        """The caller of the oldest request leaves now and then: others may have relied on it."""
        if self.sched.live and self.rng.random() < 0.2:
            rid = min(self.sched.live)
            self.sched.abort(rid)
            self.aborted.add(rid)

    def check_text(self) -> None:
        assert self.tokens.keys() == set(range(len(self.load.requests))) - self.aborted
        for i, tokens in self.tokens.items():
            prompt, max_new, stops, _ = self.load.requests[i]
            assert tokens == alone(prompt, max_new, stops), f"request {i}"


@pytest.mark.parametrize("seed", range(60))
def test_every_request_says_what_it_says_alone(seed: int) -> None:
    rng = random.Random(seed)
    for drafts in (0, 0, 0, 0, 0, 0, 1, 1, 2, 3):
        run = Losses(random_load(rng), rng, drafts=drafts)
        run.play()
        run.check_text()


def test_the_loads_above_really_lose_plans_at_every_depth() -> None:
    for depth in (1, 2, 3):
        runs = [Losses(replace(random_load(rng), depth=depth), rng) for rng in map(random.Random, range(20))]
        for run in runs:
            run.play()
        assert sum(run.n_undone for run in runs) > 40


def scheduler(n_pages: int = 8, page: int = 4) -> Scheduler:
    return Scheduler(PagePool(n_pages, page), max_step_tokens=8, max_running=4)


def test_a_chunk_of_a_prompt_is_taken_back_and_the_computed_part_stays() -> None:
    s = scheduler()
    request = Request(1, list(range(20)), 4)
    s.add(request)
    first = s.plan()
    second = s.plan()
    s.commit(first, {})
    s.undo(second)
    assert (request.done, request.inflight, len(request.pages)) == (8, 0, 2)
    assert len(s.pool.match(list(range(20)))[0]) == 2, "what was computed can be found, the rest cannot"
    assert s.plan() == second


def test_an_admission_that_is_taken_back_leaves_the_request_where_it_waited() -> None:
    s = scheduler()
    requests = [Request(rid, [rid] * 6, 2) for rid in range(3)]
    for request in requests:
        s.add(request)
    plan = s.plan()
    assert len(plan.slices) == 2
    s.undo(plan)
    assert list(s.waiting) == requests
    assert not s.running
    assert s.pool.n_free == s.pool.n_pages
    assert s.plan() == plan


def test_a_sample_that_never_came_is_planned_again() -> None:
    s = scheduler()
    s.add(Request(1, [1, 2, 3], 4))
    s.commit(s.plan(), {1: [9]})
    second, third = s.plan(), s.plan()
    s.undo(third)
    s.undo(second)
    assert s.live[1].inflight == 0
    assert s.plan() == second


def test_who_shares_a_prefix_that_was_not_computed_starts_anew() -> None:
    s = scheduler()
    s.add(Request(1, list(range(7)), 2))
    first = s.plan()
    s.add(Request(2, list(range(7)), 2))
    second = s.plan()
    assert second.slices[-1].start == 4, "it relies on the first plan"
    s.undo(second)
    s.undo(first)
    assert s.pool.match(list(range(7)))[0] == []
    assert s.live[2].n_cached is None
    assert [slice.start for slice in s.plan().slices] == [0, 4]


def test_a_page_of_an_aborted_request_is_not_found_for_what_never_came() -> None:
    s = scheduler()
    s.add(Request(1, list(range(7)), 2))
    plan = s.plan()
    s.abort(1)
    assert s.pool.match(list(range(7)))[0] != []
    s.undo(plan)
    assert s.pool.match(list(range(7)))[0] == []
    assert s.pool.n_free == s.pool.n_pages


# Bugs put in on purpose ----------------------------------------------------------------------------------------------


class LeavesPagesFindable(PagePool):
    def unpublish(self, pages: Sequence[int]) -> None:
        pass


class KeepsWhatWasPlanned(Scheduler):
    """Takes the samples back, but not the positions."""

    def undo(self, plan: StepPlan) -> None:
        for s in plan.slices:
            if req := self.live.get(s.rid):
                req.inflight -= s.sample


class KeepsAdmissions(Scheduler):
    """A request whose admission is taken back keeps the pages that it found."""

    def _unadmit(self, req: Request) -> None:
        req.done = req.begun


class ForgetsTheEnded(Scheduler):
    """Only requests that still live count."""

    def undo(self, plan: StepPlan) -> None:
        super().undo(StepPlan(tuple(s for s in plan.slices if s.rid in self.live)))


@pytest.mark.parametrize(
    "bug", [LeavesPagesFindable, KeepsWhatWasPlanned, KeepsAdmissions, ForgetsTheEnded], ids=lambda bug: bug.__name__
)
def test_the_text_shows_a_bug_that_was_put_in(bug: type) -> None:
    """Without the checks after each step: the text alone must show it."""
    broken = {"make_pool": bug} if issubclass(bug, PagePool) else {"make_scheduler": bug}

    def is_found(seed: int) -> bool:
        rng = random.Random(seed)
        run = Losses(random_load(rng), rng, check=False, **broken)
        try:
            run.play()
            run.check_text()
        except (AssertionError, ValueError, IndexError, KeyError):
            return True
        return False

    assert any(is_found(seed) for seed in range(200))
