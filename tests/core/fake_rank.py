"""A rank without a model, for tests: a cache of ints, and a next token that depends on everything the pages hold.

Whatever a schedule gets wrong (a wrong page table, a page reused too early, a prefix that is not there yet, a position
left out) changes a cell that the next token is computed from, so it changes the text.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import DRAFT, LAST, Scheduler, Slice, StepPlan

VOCAB = 6
ROOT = 12345


def cell(before: int, token: int, read: bool = False) -> int:
    """What one position leaves in the cache: it depends on its token, on what it attended to and, in a rank of two
    forms, on whether it was computed as part of a prompt's whole pages."""
    return hash((before, token, read)) if read else hash((before, token))


def next_token(cells: Iterable[int]) -> int:
    return hash(tuple(cells)) // 7 % VOCAB


def alone(prompt: list[int], max_new: int, stop_ids: Iterable[int] = (), page: int = 0) -> list[int]:
    """Tokens of a request that has the machine to itself: no pages, no scheduler.

    `page`: that of a rank with two forms.
    """
    n_read = (len(prompt) - 1) // page * page if page else 0
    tokens, cells = list(prompt), list[int]()
    while len(tokens) - len(prompt) < max_new:
        for token in tokens[len(cells) :]:
            cells.append(cell(cells[-1] if cells else ROOT, token, len(cells) < n_read))
        tokens.append(next_token(cells))
        if tokens[-1] in stop_ids:
            break
    return tokens


class FakeRank:
    """Runs plans in order. As in a layer of a model, all slices write (in order) before any reads."""

    def __init__(self, n_pages: int, page: int, two_forms: bool = False, drafts: int = 0) -> None:
        """`drafts`: tokens it guesses after each one it samples; about two of three are right."""
        self.page, self.two_forms, self.n_drafts = page, two_forms, drafts
        self.cache = [[0] * page for _ in range(n_pages)]
        self.last: dict[int, int] = {}
        self.drafts: dict[int, list[int]] = {}
        self.n_tokens = 0

    def run(self, plan: StepPlan) -> dict[int, list[int]]:
        """The tokens that each sampling slice yields, by request."""
        written = Counter[tuple[int, int]]()
        for s in plan.slices:
            guesses = iter(self.drafts.get(s.rid, ()))
            for position, token in enumerate(s.tokens, s.start):
                before = self._read(s.pages, position - 1) if position else ROOT
                page, slot = s.pages[position // self.page], position % self.page
                known = self.last[s.rid] if token == LAST else next(guesses) if token == DRAFT else token
                self.cache[page][slot] = cell(before, known, self.two_forms and position < s.prompt_end)
                written[page, slot] += 1
        assert set(written.values()) <= {1}, "two slices of one step write the same place"
        self.n_tokens += plan.n_tokens
        new = {s.rid: self._sample(s) for s in plan.slices if s.sample}
        self.last.update((rid, tokens[-1]) for rid, tokens in new.items())
        return new

    def _sample(self, s: Slice) -> list[int]:
        """The token after its last one, then those after the guesses that were right; and new guesses."""
        first = s.end - s.n_drafts
        cells = [self._read(s.pages, i) for i in range(s.end)]
        new = [next_token(cells[:first])]
        for i, guess in enumerate(self.drafts.get(s.rid, [])[: s.n_drafts], 1):
            if guess != new[-1]:
                break
            new.append(next_token(cells[: first + i]))
        cells = cells[: first + len(new) - 1]
        guesses = self.drafts[s.rid] = list[int]()
        for _ in range(self.n_drafts):
            cells.append(cell(cells[-1], guesses[-1] if guesses else new[-1]))
            right = next_token(cells)
            guesses.append(right if cells[-1] % 3 else (right + 1) % VOCAB)
        return new

    def holds(self, tokens: Sequence[int], pages: Sequence[int], n_prompt: int) -> bool:
        """Whether `pages` hold the cache of `tokens`: what a hand-over to another rank would read."""
        before, n_read = ROOT, (n_prompt - 1) // self.page * self.page if self.two_forms else 0
        for position, token in enumerate(tokens):
            before = cell(before, token, position < n_read)
            if self._read(pages, position) != before:
                return False
        return True

    def _read(self, pages: Sequence[int], position: int) -> int:
        return self.cache[pages[position // self.page]][position % self.page]


@dataclass
class Load:
    """One random machine and what is asked of it."""

    page: int
    n_pages: int
    max_step_tokens: int
    max_running: int
    depth: int
    requests: list[tuple[list[int], int, frozenset[int], str]]
    """Prompt, max_new, stop ids, salt."""
    arrivals: list[int]
    """Step at which each request comes."""
    aborts: dict[int, int] = field(default_factory=dict)
    """Request -> step at which its caller leaves."""
    hold: int = 0
    """Steps between the end of a request and the release of its pages (a hand-over takes that long)."""
    priorities: dict[int, int] = field(default_factory=dict)
    """Of requests that do not have priority 0."""


def random_load(rng: random.Random, *, aborts: bool = True) -> Load:
    """Few distinct tokens and common beginnings, so that prefixes meet; pools from barely enough to roomy."""
    page = rng.choice((1, 2, 3, 4, 8))
    n = rng.randint(1, 14)
    stems = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 24))] for _ in range(3)]
    requests = []
    for _ in range(n):
        stem = rng.choice(stems)
        tail = [rng.randrange(2) for _ in range(rng.choice((0, 0, 1, 5)))]
        prompt = (stem[: rng.randint(1, len(stem))] + tail) if rng.random() < 0.7 else list(stem)
        stops = frozenset(rng.sample(range(VOCAB), rng.choice((0, 0, 1, 2))))
        requests.append((prompt, rng.randint(1, 14), stops, rng.choice(("", "", "tenant"))))
    need = max(-(-(len(p) + m - 1) // page) for p, m, _, _ in requests)
    return Load(
        page=page,
        n_pages=need + rng.choice((0, 0, 1, 2, need, 8 * need)),
        max_step_tokens=rng.choice((1, 2, 3, 5, 8, 16, 64)),
        max_running=rng.choice((1, 2, 4, 16)),
        depth=rng.randint(1, 3),
        requests=requests,
        arrivals=[rng.choice((0, 0, rng.randrange(20))) for _ in range(n)],
        aborts={i: rng.randrange(30) for i in range(n) if aborts and rng.random() < 0.2},
        hold=rng.choice((0, 0, 0, 3)),
        priorities={i: rng.randint(-2, 2) for i in range(n)} if rng.random() < 0.5 else {},
    )


@dataclass
class Run:
    """What happened: the texts, and how often each thing that the tests are about really occurred."""

    tokens: dict[int, list[int]]
    aborted: set[int]
    n_steps: int
    n_preempted: int
    n_cached: int
    n_late: int
    """Requests that ended while later steps of theirs were already planned."""
    n_computed: int
    n_drafted: int = 0
    n_accepted: int = 0


def play(
    load: Load,
    *,
    make_pool: Callable[[int, int], PagePool] = PagePool,
    make_scheduler: type[Scheduler] = Scheduler,
    check: bool = True,
    max_steps: int | None = None,
    two_forms: bool = False,
    share_answers: bool = True,
    drafts: int = 0,
) -> Run:
    """Drive the scheduler as the engine's loop does: results arrive when `depth` steps are in flight."""
    pool = make_pool(load.n_pages, load.page)
    limits = {"max_step_tokens": load.max_step_tokens, "max_running": load.max_running}
    sched = make_scheduler(pool, **limits, share_answers=share_answers, drafts=drafts)
    rank = FakeRank(load.n_pages, load.page, two_forms, drafts)
    requests = {
        i: Request(i, list(p), m, s, salt, priority=load.priorities.get(i, 0))
        for i, (p, m, s, salt) in enumerate(load.requests)
    }
    pending: deque[tuple[StepPlan, dict[int, list[int]]]] = deque()
    ended: deque[tuple[int, Request, list[int]]] = deque()
    run = Run({}, set(), 0, 0, 0, 0, 0)
    limit = step_bound(load) if max_steps is None else max_steps
    step = 0
    while step <= max(load.arrivals, default=0) or sched.busy or ended or any(p for p, _ in pending):
        assert step < limit, f"not finished after {limit} steps"
        for i, request in requests.items():
            if load.arrivals[i] == step:
                sched.add(request)
            if load.aborts.get(i) == step and sched.abort(i):
                run.aborted.add(i)
        before = {r.rid: r.done for r in sched.running}
        plan = sched.plan()
        pending.append((plan, rank.run(plan)))
        if check:
            check_plan(sched, plan, before)
            check_state(sched, [r for _, r, _ in ended], [p for p, _ in pending])
        if len(pending) == load.depth:
            pages = {r.rid: list(r.pages) for r in sched.running}
            for request in sched.commit(*pending.popleft()):
                run.n_late += any(s.rid == request.rid for p, _ in pending for s in p.slices)
                ended.append((step + load.hold, request, pages.get(request.rid, [])))
        while ended and ended[0][0] <= step:
            _, request, kept = ended.popleft()
            assert not kept or rank.holds(request.tokens[:-1], kept, request.n_prompt), (
                "pages were used again before their release"
            )
            sched.release(request)
            run.tokens[request.rid] = request.tokens
        if check:
            check_state(sched, [r for _, r, _ in ended], [p for p, _ in pending])
        step += 1
    assert pool.n_free == load.n_pages, "pages are lost"
    run.n_steps, run.n_preempted, run.n_computed = step, sched.n_preempted, rank.n_tokens
    run.n_drafted, run.n_accepted = sched.n_drafted, sched.n_accepted
    run.n_cached = sum(r.n_cached or 0 for r in requests.values())
    return run


def step_bound(load: Load) -> int:
    """Every step advances the first running request, unless it waits for a commit or for pages to be released."""
    work = sum(len(p) + m for p, m, _, _ in load.requests)
    return max(load.arrivals, default=0) + (load.depth + 1) * (work + load.hold * len(load.requests)) + 10


def check_plan(sched: Scheduler, plan: StepPlan, done_before: dict[int, int]) -> None:
    """A plan is within the limits, names each request once, and continues exactly where the last one ended."""
    assert plan.n_tokens <= sched.max_step_tokens
    assert len({s.rid for s in plan.slices}) == len(plan.slices)
    running = {r.rid: r for r in sched.running}
    for s in plan.slices:
        r = running[s.rid]
        assert len(s.tokens) >= 1
        assert s.end == r.done
        assert s.start == done_before.get(s.rid, s.start)
        assert s.pages == tuple(r.pages)
        assert len(s.pages) == -(-s.end // sched.pool.page)
        known = len([t for t in s.tokens if t not in (LAST, DRAFT)])
        assert list(s.tokens[:known]) == r.tokens[s.start : s.start + known]
        assert s.sample == (s.end - s.n_drafts == len(r.tokens) + r.inflight - s.sample)
        assert s.n_drafts <= sched.drafts * s.sample


def check_state(sched: Scheduler, ended: list[Request], pending: list[StepPlan]) -> None:
    """Pages are conserved, and what the scheduler knows about each request agrees with the plans in flight."""
    pool = sched.pool
    filling = list(sched.filling.holding.values())
    held = Counter(p for r in [*sched.running, *filling, *ended] for p in r.pages)
    assert pool.refs == [held[p] for p in range(pool.n_pages)]
    assert pool.n_free == pool.n_pages - len(held)
    assert len(sched.running) + len(filling) <= sched.max_running
    everyone = [*sched.running, *sched.waiting]
    for queue in (sched.running, sched.waiting):
        assert [r.priority for r in queue] == sorted(r.priority for r in queue)
    assert len(everyone) + len(sched.filling) == len(sched.live)
    assert all(sched.live[r.rid] is r for r in everyone)
    samples = Counter(s.rid for p in pending for s in p.slices if s.sample)
    for r in everyone:
        assert r.inflight == samples[r.rid]
        assert r.finish is None
    assert not any(r.pages for r in sched.waiting)
    for r in sched.running:
        assert len(set(r.pages)) == len(r.pages)
        assert len(r.pages) == -(-r.done // pool.page)
        assert r.todo >= 0
        assert r.done <= r.n_prompt + r.max_new - 1
