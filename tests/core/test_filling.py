"""A store below memory changes what is computed, never the text: whatever it has, when it answers, how much it fills.

Steps are lost now and then as well, and clients leave. The last tests put bugs in, to see that these tests can fail.
"""

import random
from collections import deque
from collections.abc import Iterator

import pytest

from brigade.core.filling import Fill
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, StepPlan
from tests.core.fake_rank import ROOT, FakeRank, Load, alone, cell, check_plan, check_state, random_load, step_bound
from tests.core.test_undo import spoil

Key = tuple[str, tuple[int, ...]]


class Stored:
    """One load on a machine with a store that is late, forgets, and fills only a part of what was asked for."""

    def __init__(
        self, load: Load, rng: random.Random, scheduler: type[Scheduler] = Scheduler, two_forms: bool = False
    ) -> None:
        self.load, self.rng, self.two_forms = load, rng, two_forms
        self.pool, self.rank = PagePool(load.n_pages, load.page), FakeRank(load.n_pages, load.page, two_forms)
        limits = {"max_step_tokens": load.max_step_tokens, "max_running": load.max_running}
        self.sched = scheduler(self.pool, **limits, share_answers=not two_forms)
        self.cells: dict[Key, list[int]] = {}
        """What the store has: the cells of the page that ends with these tokens."""
        self.reading: list[tuple[int, list[StepPlan], Fill]] = []
        """When, behind which steps that were in flight, and what."""
        self.pending: deque[StepPlan] = deque()
        self.requests = {
            i: Request(i, list(p), m, s, salt, priority=load.priorities.get(i, 0))
            for i, (p, m, s, salt) in enumerate(load.requests)
        }
        self.tokens: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.n_filled = self.n_short = self.n_joined = 0
        for req in self.requests.values():
            if rng.random() < 0.6:
                self.restart_with(req)

    def restart_with(self, req: Request) -> None:
        """The store has the pages of this prompt from an earlier life."""
        before, cells, page = ROOT, list[int](), self.load.page
        tokens = self.sched.shareable(req)
        for i, token in enumerate(tokens[: (len(tokens) - 1) // page * page], 1):
            before = cell(before, token, self.two_forms)
            cells.append(before)
            if i % page == 0:
                self.cells[req.salt, tuple(tokens[:i])] = cells[-page:]

    def play(self) -> "Stored":
        load, sched = self.load, self.sched
        step, limit = 0, 6 * step_bound(load) + 200
        while step <= max(load.arrivals) or sched.live or any(self.pending):
            assert step < limit, f"not finished after {limit} steps"
            for i, req in self.requests.items():
                if load.arrivals[i] == step:
                    req.stored = sum(1 for _ in self.known(sched.shareable(req), req.salt)) * load.page
                    sched.add(req)
                if load.aborts.get(i) == step:
                    self.leave(i)
            self.answer(step)
            before = {r.rid: r.done for r in sched.running}
            plan = sched.plan()
            check_plan(sched, plan, before)
            behind = list(self.pending)
            self.reading += [(step + self.rng.choice((0, 1, 5)), behind, fill) for fill in sched.filling.begun]
            sched.filling.begun.clear()
            self.n_joined += len(sched.filling) - len(sched.filling.holding)
            self.pending.append(plan)
            if step < limit // 6 and self.rng.random() < 0.1:
                self.lose()
            elif len(self.pending) == load.depth:
                self.commit()
            check_state(sched, [], list(self.pending))
            step += 1
        assert self.pool.n_free == load.n_pages, "pages are lost"
        return self

    def known(self, tokens: list[int], salt: str) -> Iterator[list[int]]:
        for end in range(self.load.page, len(tokens), self.load.page):
            if (cells := self.cells.get((salt, tuple(tokens[:end])))) is None:
                return
            yield cells

    def answer(self, step: int) -> None:
        """A step in flight may still write pages of a request that has left, so nothing is filled before it has run."""
        later = [x for x in self.reading if x[0] > step or any(p is q for p in x[1] for q in self.pending)]
        due = [x for x in self.reading if x not in later and x[2].rid in self.sched.live]
        self.reading = later
        for _, _, fill in due:
            page, end = self.load.page, fill.start
            for cells, at in zip(self.known([*fill.tokens, 0], fill.salt), fill.pages, strict=False):
                if end + page > fill.end or (end >= fill.start and self.rng.random() < 0.1):
                    break
                if fill.pages.index(at) * page >= fill.start:
                    self.rank.cache[at][:] = cells
                    end += page
            for at in fill.pages[end // page :]:  # what is not filled holds anything
                self.rank.cache[at][:] = [self.rng.randrange(1 << 30) for _ in range(page)]
            self.n_filled += (end - fill.start) // page
            self.n_short += end < fill.end
            self.sched.filled(fill.rid, end)

    def commit(self) -> None:
        plan = self.pending.popleft()
        new = self.rank.run(plan)
        finished = self.sched.commit(plan, new)
        for rid in new:
            if self.rng.random() < 0.8 and (len(self.requests[rid].tokens) == self.requests[rid].n_prompt + 1):
                self.store(self.requests[rid])
        for req in finished:
            if self.rng.random() < 0.8:
                self.store(req)
            self.sched.release(req)
            self.tokens[req.rid] = req.tokens
        if self.rng.random() < 0.05 and self.cells:
            del self.cells[self.rng.choice(list(self.cells))]

    def store(self, req: Request) -> None:
        """As the engine does: the request's own pages, as far as they can be found."""
        tokens = self.sched.shareable(req)
        for end, at in zip(range(self.load.page, len(tokens), self.load.page), req.pages, strict=False):
            if self.pool.node(at) is not None:
                self.cells[req.salt, tuple(tokens[:end])] = list(self.rank.cache[at])

    def lose(self) -> None:
        for plan in self.pending:
            spoil(self.rank, plan, self.rng)
        while self.pending:
            self.sched.undo(self.pending.pop())
            check_state(self.sched, [], list(self.pending))

    def leave(self, rid: int) -> None:
        if self.sched.abort(rid):
            self.aborted.add(rid)

    def check_text(self) -> None:
        assert self.tokens.keys() == self.requests.keys() - self.aborted
        for i, tokens in self.tokens.items():
            prompt, max_new, stops, _ = self.load.requests[i]
            assert tokens == alone(prompt, max_new, stops, self.load.page if self.two_forms else 0), f"request {i}"


def run(seed: int, scheduler: type[Scheduler] = Scheduler) -> Stored:
    rng = random.Random(seed)
    return Stored(random_load(rng), rng, scheduler, two_forms=seed % 3 == 0).play()


@pytest.mark.parametrize("seed", range(120))
def test_every_request_says_what_it_says_alone(seed: int) -> None:
    run(seed).check_text()


def test_the_loads_above_really_fill_in_part_and_wait_for_each_other() -> None:
    runs = [run(seed) for seed in range(120)]
    assert sum(r.n_filled for r in runs) >= 100
    assert sum(r.n_short for r in runs) >= 20
    assert sum(r.n_joined for r in runs) >= 5


class BelievesTheStore(Scheduler):
    """Takes all pages for filled."""

    def filled(self, rid: int, end: int) -> None:
        super().filled(rid, self.live[rid].stored)


class TakesWhatWasFoundForWritten(Scheduler):
    """Forgets that pages which a request had found may never have been computed."""

    def filled(self, rid: int, end: int) -> None:
        self._spoilt.discard(rid)
        super().filled(rid, end)


class KeepsWhatWasNotFilled(Scheduler):
    def filled(self, rid: int, end: int) -> None:
        pages = list(self.live[rid].pages)
        super().filled(rid, end)
        self.live[rid].pages = pages


class LosesWhoWaits(Scheduler):
    def filled(self, rid: int, end: int) -> None:
        self.filling._behind.pop(rid, None)
        super().filled(rid, end)


@pytest.mark.parametrize(
    "bug",
    [BelievesTheStore, TakesWhatWasFoundForWritten, KeepsWhatWasNotFilled, LosesWhoWaits],
    ids=lambda b: b.__name__,
)
def test_a_bug_that_was_put_in_shows(bug: type[Scheduler]) -> None:
    def shows(seed: int) -> bool:
        try:
            run(seed, bug).check_text()
        except (AssertionError, ValueError, IndexError, KeyError):
            return True
        return False

    assert any(shows(seed) for seed in range(400))


def machine() -> Scheduler:
    return Scheduler(PagePool(16, 2), max_step_tokens=16, max_running=4)


def test_what_is_stored_is_filled_behind_the_steps_of_others() -> None:
    sched = machine()
    req = Request(1, [1, 2, 3, 4, 5], 4, stored=4)
    sched.add(req)
    sched.add(Request(2, [9], 4))
    plan = sched.plan()
    assert [s.rid for s in plan.slices] == [2]
    (fill,) = sched.filling.begun
    assert (fill.rid, fill.tokens, fill.start, len(fill.pages)) == (1, (1, 2, 3, 4), 0, 2)
    sched.filled(1, 4)
    plan = sched.plan()
    assert [(s.rid, s.tokens, s.start) for s in plan.slices][1] == (1, (5,), 4)
    assert (req.n_cached, req.n_stored) == (4, 4)


def test_pages_in_memory_are_not_read_again() -> None:
    sched = machine()
    sched.add(Request(1, [1, 2, 3], 1))
    sched.commit(sched.plan(), {1: [7]})
    req = Request(2, [1, 2, 3, 4, 5], 4, stored=4)
    sched.add(req)
    assert not sched.plan()
    assert [(f.start, f.end) for f in sched.filling.begun] == [(2, 4)]
    assert not sched.busy
    sched.filled(2, 2)
    assert [(s.tokens, s.start) for s in sched.plan().slices] == [((3, 4, 5), 2)]
    assert (req.n_cached, req.n_stored) == (2, 0)


def test_two_with_the_same_beginning_read_it_once_also_when_the_first_one_leaves() -> None:
    sched = machine()
    for rid in (1, 2, 3):
        sched.add(Request(rid, [1, 2, 3, 4, 10 + rid], 4, stored=4))
    assert not sched.plan()
    assert [f.rid for f in sched.filling.begun] == [1]
    assert sched.abort(1)
    assert not sched.filling.begun
    assert not sched.plan()
    assert [f.rid for f in sched.filling.begun] == [2]
    sched.filled(2, 4)
    assert [(s.rid, s.tokens) for s in sched.plan().slices] == [(2, (12,)), (3, (13,))]
    assert not len(sched.filling)


def test_another_tenant_reads_for_itself() -> None:
    sched = machine()
    for rid, salt in enumerate(("a", "b")):
        sched.add(Request(rid, [1, 2, 3], 4, salt=salt, stored=2))
    assert not sched.plan()
    assert [f.salt for f in sched.filling.begun] == ["a", "b"]


def test_what_cannot_be_filled_at_all_is_computed_and_not_asked_for_again() -> None:
    sched = machine()
    sched.add(Request(1, [1, 2, 3], 4, stored=2))
    assert not sched.plan()
    sched.filled(1, 0)
    assert sched.pool.n_free == 16
    assert [(s.tokens, s.start) for s in sched.plan().slices] == [((1, 2, 3), 0)]
