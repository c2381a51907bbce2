"""Prompts computed on one rank and continued on another say what one rank says, whatever is lost, late or given up.

A whole fleet is played in simulated time: a gateway that follows the table, ranks with fake caches, messages that take
their time, transfers that copy cell by cell. The last tests put bugs in, to see that these tests can fail.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from brigade.core.handover import TABLE, Action, Deadlines, Event, Handover, Leases, State
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, StepPlan
from tests.core.fake_rank import FakeRank, alone, check_plan

Prompt = tuple[list[int], int, frozenset[int]]


@dataclass
class Transfer:
    """Copies cells of a prompt, a few in each step, in two: first it is told what a cell holds, then it reads it."""

    req: Request
    source: "Rank"
    rid: int
    """The number of the request on the rank that computes it."""
    at: int
    """Cells before it are here."""
    told: deque[tuple[Any, int, int]] = field(default_factory=deque)
    """(what a cell holds, its page, its slot)."""
    token: int = -1
    """The first one; -1: it is not known yet."""
    patience: int = 0
    stopped: bool = False

    @property
    def complete(self) -> bool:
        return self.at == len(self.req.tokens)


class Rank:
    """One rank, with the rules that the module's text gives. What it does for a request, the request says."""

    def __init__(self, world: "World", role: str, page: int, n_pages: int, scheduler: type[Scheduler]) -> None:
        self.world, self.role, self.rng = world, role, world.rng
        self.scheduler = scheduler(
            PagePool(n_pages, page),
            max_step_tokens=self.rng.choice((2, 5, 16)),
            max_running=self.rng.choice((2, 4, 8)),
            drafts=world.drafts,
        )
        self.cache = FakeRank(n_pages, page, drafts=world.drafts)
        for cells in self.cache.cache:  # a new rank's memory holds anything
            cells[:] = [self.rng.randrange(1 << 30) for _ in cells]
        self.leases, self.depth = Leases(), self.rng.randint(1, 3)
        self.expected: set[int] = set()
        self.ready: dict[int, tuple[int, list[int]]] = {}
        """What is offered: cells before this one are finished, and lie in these pages."""
        self.asked: deque[tuple[int, Request]] = deque()
        self.transfers: dict[int, Transfer] = {}
        self.reserved_at: dict[int, int] = {}
        self.doomed: set[int] = set()
        self.pending: deque[tuple[StepPlan, dict[int, list[int]]]] = deque()
        self.inbox: deque[tuple[int, Callable[[], None]]] = deque()

    def tell(self, what: Callable[..., None], *args: Any) -> None:
        due = max(self.world.now + self.rng.choice((0, 1, 4)), self.inbox[-1][0] if self.inbox else 0)
        self.inbox.append((due, partial(what, *args)))

    # What a rank can be told

    def prefill(self, rid: int, tokens: list[int], p: Prompt) -> None:
        prompt, max_new, stops = p
        new = len(tokens) - len(prompt)
        if new + 1 < max_new:
            self.expected.add(rid)
        self.scheduler.add(Request(rid, tokens, min(max_new, new + 1), stops, n_prompt=len(prompt)))

    def compute(self, rid: int, tokens: list[int], p: Prompt) -> None:
        prompt, max_new, stops = p
        self.scheduler.add(Request(rid, tokens, max_new, stops, n_prompt=len(prompt)))

    def reserve(self, rid: int, tokens: list[int], p: Prompt) -> None:
        prompt, max_new, stops = p
        req = Request(rid, tokens, max_new, stops, n_prompt=len(prompt))
        self.scheduler.check(req)
        self.asked.append((rid, req))
        self.reserved_at[rid] = self.world.now

    def follow(self, rid: int, source: "Rank", source_rid: int) -> None:
        if (req := self.scheduler.arriving.get(rid)) is None:
            self.world.heard(rid, Event.DECODE_LOST)
        elif (t := self.transfers.get(rid)) is None:
            self.transfers[rid] = Transfer(req, source, source_rid, req.done)
        elif (t.source, t.rid) != (source, source_rid):
            self.world.n_moved += req.done < t.at < len(req.tokens)
            t.source, t.rid = source, source_rid
            t.told.clear()

    def adopt(self, rid: int, token: int) -> None:
        if rid not in self.transfers:
            self.world.heard(rid, Event.DECODE_LOST)
        elif self.transfers[rid].token < 0:
            self.transfers[rid].token = token

    def drop(self, rid: int) -> None:
        if rid in self.transfers:
            self.transfers[rid].stopped = True
            return
        self.asked = deque(x for x in self.asked if x[0] != rid)
        self.expected.discard(rid)
        self.ready.pop(rid, None)
        self.scheduler.abort(rid)
        if req := self.leases.end(rid):
            self.scheduler.release(req)

    # What it does in each step

    def step(self) -> None:
        while self.inbox and self.inbox[0][0] <= self.world.now:
            self.inbox.popleft()[1]()
        self.expire()
        while self.asked and self.scheduler.reserve(self.asked[0][1]):
            rid, _ = self.asked.popleft()
            self.world.heard(rid, Event.RESERVED)
        for rid in list(self.transfers):
            self.copy(rid)
        before = {r.rid: r.done for r in self.scheduler.running}
        plan = self.scheduler.plan()
        check_plan(self.scheduler, plan, before)
        if self.rng.random() < self.world.p_undo:
            self.undo(plan)
            return
        self.offer(plan)
        self.pending.append((plan, self.cache.run(plan)))
        self.wrote(plan)
        if len(self.pending) >= self.depth:
            self.commit()

    def offer(self, plan: StepPlan) -> None:
        for rid in self.ready:
            if rid in self.scheduler.live and not self.scheduler.live[rid].pages:
                self.retract(rid)
        for s in plan.slices:
            if s.rid in self.expected and s.rid not in self.ready:
                self.ready[s.rid] = 0, []
                self.world.heard(s.rid, Event.OFFERED, source=self, number=s.rid)

    def wrote(self, plan: StepPlan) -> None:
        for s in plan.slices:
            if s.rid in self.ready:
                self.ready[s.rid] = s.end, list(s.pages)

    def retract(self, rid: int) -> None:
        self.world.n_retracted += self.ready[rid][0] > 0
        if self.world.retracts:
            self.ready[rid] = 0, []

    def undo(self, newest: StepPlan) -> None:
        """Another rank of the unit is lost: some plans in flight were not run."""
        self.spoil(newest)
        self.scheduler.undo(newest)
        n_run = self.rng.randint(0, len(self.pending))
        for _ in range(n_run):
            self.commit()
        while self.pending:
            plan, _ = self.pending.pop()
            self.spoil(plan)
            for s in plan.slices:
                if s.rid in self.scheduler.live:
                    self.cache.last[s.rid] = self.scheduler.live[s.rid].tokens[-1]
            self.scheduler.undo(plan)
        for rid in self.ready:
            if rid in self.scheduler.live:
                self.retract(rid)

    def spoil(self, plan: StepPlan) -> None:
        for s in plan.slices:
            for position in range(s.start, s.end):
                self.cache.cache[s.pages[position // self.cache.page]][position % self.cache.page] = self.rng.random()  # type: ignore[call-overload]

    def commit(self) -> None:
        plan, new = self.pending.popleft()
        live = {rid: self.scheduler.live[rid] for rid in new if rid in self.scheduler.live}
        pages = {rid: list(req.pages) for rid, req in live.items()}
        known = {rid: len(req.tokens) for rid, req in live.items()}
        finished = self.scheduler.commit(plan, new)
        for rid, req in live.items():
            for token in req.tokens[known[rid] :][: -1 if req in finished else None]:
                self.world.heard_token(rid, token, last=False)
        for req in finished:
            rid, token = req.rid, req.tokens[-1]
            goes_on = rid in self.expected and self.world.goes_on(rid, token)
            self.expected.discard(rid)
            if goes_on:
                self.leases.hold(req, self.world.now + self.rng.choice(self.world.leases))
                self.ready[rid] = len(req.tokens) - 1, pages[rid]
                self.world.heard_token(rid, token, last=False)
                self.world.heard(rid, Event.COMPUTED, token=token)
            else:
                self.ready.pop(rid, None)
                self.scheduler.release(req)
                self.world.heard_token(rid, token, last=True)

    def copy(self, rid: int) -> None:
        t = self.transfers[rid]
        assert t.req.pages, "pages went back while they are being written"
        for _ in range(self.rng.choice((0, 1, 3, 50))):
            self.world.n_early += t.token < 0 and self.read(t)
            if t.token >= 0:
                self.read(t)
        t.patience += t.token >= 0 and not t.complete
        failed = t.patience > 30 or (t.token >= 0 and self.rng.random() < self.world.p_bad)
        if t.stopped:
            del self.transfers[rid]
            self.scheduler.abort(rid)
        elif t.token >= 0 and (t.complete or failed):
            del self.transfers[rid]
            self.world.n_filled += not failed
            self.cache.last[rid] = t.token
            self.scheduler.adopt(rid, t.token, not failed)
            self.world.heard(rid, Event.ADOPTED)

    def read(self, t: Transfer) -> bool:
        """Get on with a transfer; whether a cell has come."""
        end, pages = t.source.ready.get(t.rid, (0, []))
        if t.source not in self.world.ranks:  # it tells nothing any more
            end = 0
        page = t.source.cache.page
        for i in range(t.at + len(t.told), min(end, len(t.req.tokens), t.at + len(t.told) + self.rng.randint(0, 4))):
            t.told.append((t.source.cache.cache[pages[i // page]][i % page], pages[i // page], i % page))
        if not t.told or self.rng.random() < 0.3:
            return False
        want, at_page, slot = t.told.popleft()
        mine = self.cache.cache[t.req.pages[t.at // self.cache.page]]
        mine[t.at % self.cache.page] = t.source.cache.cache[at_page][slot]
        if mine[t.at % self.cache.page] != want:  # used again meanwhile: it is told anew
            self.world.n_used_again += 1
            t.told.clear()
            return False
        t.at += 1
        return True

    def expire(self) -> None:
        for req in self.leases.expired(self.world.now):
            self.world.n_leases_ended += 1
            self.ready.pop(req.rid)
            self.scheduler.release(req)
        for rid, since in list(self.reserved_at.items()):
            t = self.transfers.get(rid)
            if (t and t.token >= 0) or (rid not in self.scheduler.arriving and all(r != rid for r, _ in self.asked)):
                del self.reserved_at[rid]
            elif self.world.now - since > 500:
                self.drop(rid)

    @property
    def idle(self) -> bool:
        return not (self.inbox or self.asked or self.transfers or self.leases or self.scheduler.busy) and not any(
            p for p, _ in self.pending
        )


@dataclass
class Client:
    prompt: Prompt
    arrives: int
    leaves: int
    handover: Handover = field(default_factory=lambda: Handover(most_lost=1000))
    tokens: list[int] = field(default_factory=list)
    rank: dict[str, tuple[Rank, int]] = field(default_factory=dict)
    """By role: the rank and the number of the attempt there."""
    offer: dict[str, Any] = field(default_factory=dict)
    token: int = 0
    since: int = 0
    failed: bool = False

    @property
    def ended(self) -> bool:
        return self.handover.state is State.ENDED


class World:
    """The gateway and time."""

    def __init__(
        self,
        seed: int,
        scheduler: type[Scheduler] = Scheduler,
        losses: bool = True,
        mixed: bool = True,
        retracts: bool = True,
    ) -> None:
        rng = self.rng = random.Random(seed)
        self.retracts = retracts
        self.now, self.rids, self.drafts = 0, 0, max(seed % 4 - 1, 0)
        self.p_undo, self.p_bad = (rng.choice((0, 0.02, 0.1)), rng.choice((0, 0.2))) if losses else (0.0, 0.0)
        self.p_loss = rng.choice((0, 0.01, 0.03)) if losses else 0.0
        self.leases = (3, 60, 400) if losses else (1 << 30,)
        self.n_filled = self.n_leases_ended = self.n_lost = 0
        self.n_early = self.n_retracted = self.n_used_again = self.n_moved = 0
        self.events = Counter[tuple[State, Event]]()
        self.who: dict[int, tuple[Client, str]] = {}
        stems = [[rng.randrange(6) for _ in range(rng.randint(1, 20))] for _ in range(3)]
        prompts: list[Prompt] = []
        for _ in range(rng.randint(2, 10)):
            stem = rng.choice(stems)
            tail = [rng.randrange(6) for _ in range(rng.choice((0, 1, 4)))]
            stops = frozenset(rng.sample(range(6), rng.choice((0, 0, 1))))
            prompts.append((stem + tail, rng.randint(1, 12), stops))
        self.clients = []
        for p in prompts:
            arrives = rng.choice((0, rng.randrange(40)))
            leaves = arrives + rng.randrange(2, 90) if rng.random() < 0.25 else 1 << 30
            self.clients.append(Client(p, arrives, leaves))
        longest = max(len(p) + n for p, n, _ in prompts)

        def make(role: str) -> Callable[[], Rank]:
            page = rng.choice((1, 2, 3, 8))
            n_pages = -(-longest // page) * rng.choice((1, 1, 2, 6)) + rng.randint(0, 3)
            return lambda: Rank(self, role, page, n_pages, scheduler)

        self.make = [make("prefill") for _ in range(rng.randint(1, 2))]
        self.make += [make("decode") for _ in range(rng.randint(1, 2))]
        self.make += [make("mixed") for _ in range(rng.choice((0, 0, 1, 2)))] if mixed else []
        self.ranks = [m() for m in self.make]

    def play(self) -> "World":
        while not all(c.ended for c in self.clients) or not all(r.idle for r in self.ranks):
            self.now += 1
            assert self.now < 20_000, f"stranded: {[c.handover.state for c in self.clients]}"
            for client in self.clients:
                if client.arrives == self.now or (client.arrives == 0 and self.now == 1):
                    self.do(client, (Action.PLACE,))
                if client.leaves == self.now and client.handover.state in (s for s, e in TABLE if e is Event.LEFT):
                    self.on(client, Event.LEFT)
                if not client.ended and self.now - client.since > 900 and client.arrives < self.now - 900:
                    self.on(client, Event.EXPIRED)
            for i, rank in enumerate(self.ranks):
                if self.now < 300 and self.rng.random() < self.p_loss:
                    self.lose(i)
                else:
                    rank.step()
        for rank in self.ranks:
            assert rank.scheduler.pool.n_free == rank.scheduler.pool.n_pages, "pages are lost"
            assert not rank.scheduler.arriving
        return self

    def lose(self, i: int) -> None:
        old = self.ranks[i]
        self.ranks[i] = self.make[i]()
        self.n_lost += 1
        for cells in old.cache.cache:  # whoever still reads it reads anything
            cells[:] = [self.rng.randrange(1 << 30) for _ in cells]
        for client in self.clients:
            for side, event in (("prefill", Event.PREFILL_LOST), ("decode", Event.DECODE_LOST)):
                if not client.ended and client.rank.get(side, (None, 0))[0] is old:
                    self.on(client, event)

    # What ranks say

    def heard(self, rid: int, event: Event, **what: Any) -> None:
        if rid not in self.who:
            return
        client, _ = self.who[rid]
        if event is Event.OFFERED:
            client.offer = what
        if event is Event.COMPUTED:
            client.token = what["token"]
        self.on(client, event)

    def heard_token(self, rid: int, token: int, last: bool) -> None:
        if rid not in self.who:
            return
        client, _ = self.who[rid]
        client.tokens.append(token)
        client.since = self.now
        if last:
            self.on(client, Event.FINISHED)
        elif client.handover.state is State.COMPUTING:
            self.on(client, Event.STARTED)

    def goes_on(self, rid: int, token: int) -> bool:
        """What a rank knows itself: whether the first token is the last one, too."""
        client, _ = self.who.get(rid, (None, ""))
        if client is None:
            return True
        return token not in client.prompt[2] and len(client.tokens) + 1 < client.prompt[1]

    def on(self, client: Client, event: Event) -> None:
        before = client.handover.state
        self.events[before, event] += 1
        actions = client.handover.on(event)
        client.since = self.now
        if event in (Event.PREFILL_LOST, Event.DECODE_LOST):
            role = "prefill" if event is Event.PREFILL_LOST else "decode"
            self.forget(client, role)
        self.do(client, actions)
        if client.ended:
            for role in list(client.rank):
                self.forget(client, role)

    def do(self, client: Client, actions: tuple[Action, ...]) -> None:
        tokens = [*client.prompt[0], *client.tokens]
        for action in actions:
            match action:
                case Action.PLACE:
                    rank, _ = self.choose(client, "decode")
                    self.on(client, Event.PLACED_WHOLE if rank.role == "mixed" else Event.PLACED)
                case Action.COMPUTE:
                    rank, rid = client.rank["decode"]
                    rank.tell(rank.compute, rid, tokens, client.prompt)
                case Action.RESERVE:
                    rank, rid = client.rank["decode"]
                    rank.tell(rank.reserve, rid, tokens, client.prompt)
                case Action.PREFILL:
                    rank, rid = self.choose(client, "prefill")
                    rank.tell(rank.prefill, rid, tokens, client.prompt)
                case Action.FOLLOW:
                    rank, rid = client.rank["decode"]
                    for _ in range(self.rng.choice((1, 1, 2))):  # some messages come twice
                        rank.tell(rank.follow, rid, client.offer["source"], client.offer["number"])
                case Action.ADOPT:
                    rank, rid = client.rank["decode"]
                    for _ in range(self.rng.choice((1, 1, 2))):
                        rank.tell(rank.adopt, rid, client.token)
                case Action.DROP_PREFILL | Action.DROP_DECODE:
                    role = "prefill" if action is Action.DROP_PREFILL else "decode"
                    if role in client.rank:
                        rank, rid = client.rank[role]
                        rank.tell(rank.drop, rid)
                        self.forget(client, role)
                case Action.FAIL:
                    client.failed = True

    def choose(self, client: Client, role: str) -> tuple[Rank, int]:
        rank = self.rng.choice([r for r in self.ranks if r.role in (role, "mixed")])
        self.rids += 1
        self.who[self.rids] = client, role
        client.rank[role] = rank, self.rids
        return rank, self.rids

    def forget(self, client: Client, role: str) -> None:
        if role in client.rank:
            self.who.pop(client.rank.pop(role)[1], None)

    def check_texts(self) -> None:
        for client in self.clients:
            prompt, max_new, stops = client.prompt
            want = alone(prompt, max_new, stops)[len(prompt) :]
            if client.leaves < 1 << 30 or client.failed:
                assert client.tokens == want[: len(client.tokens)]
            else:
                assert client.tokens == want


@pytest.mark.parametrize("seed", range(120))
def test_every_request_says_what_it_says_alone_and_every_page_comes_back(seed: int) -> None:
    world = World(seed).play()
    world.check_texts()
    assert not any(c.failed for c in world.clients)


@pytest.mark.parametrize("seed", range(30))
def test_without_losses_every_prompt_is_fetched_and_none_is_computed_twice(seed: int) -> None:
    world = World(3000 + seed, losses=False, mixed=False).play()
    world.check_texts()
    assert world.n_filled == world.events[State.ADOPTING, Event.ADOPTED]


def test_the_fleets_above_go_through_almost_every_row_of_the_table() -> None:
    seen = Counter[tuple[State, Event]]()
    n_filled = n_bad = n_lost = n_leases_ended = 0
    what = Counter[str]()
    for seed in range(120):
        world = World(seed).play()
        seen += world.events
        what.update(
            early=world.n_early, retracted=world.n_retracted, used_again=world.n_used_again, moved=world.n_moved
        )
        n_filled += world.n_filled
        n_bad += world.events[State.ADOPTING, Event.ADOPTED] - world.n_filled
        n_lost += world.n_lost
        n_leases_ended += world.n_leases_ended
    rare = {e for e in TABLE if e[1] in (Event.EXPIRED, Event.REFUSED) or e[0] is State.QUEUED}
    assert set(TABLE) - rare <= set(seen)
    assert min(n_filled, n_bad, n_lost, n_leases_ended) >= 20
    assert what["early"] >= 500
    assert min(what.values()) >= 5, what


def test_bugs_in_the_scheduler_show() -> None:
    class BelievesAll(Scheduler):
        def adopt(self, rid: int, token: int, filled: bool = True) -> None:
            super().adopt(rid, token, True)

    class TakesTooMuch(Scheduler):
        def reserve(self, req: Request) -> bool:
            got = super().reserve(req)
            if got and req.done:
                self.pool.refs[req.pages[0]] += 1
            return got

    for broken in (BelievesAll, TakesTooMuch):
        n_caught = 0
        for seed in range(400):
            try:
                World(seed, broken).play().check_texts()
            except (AssertionError, ValueError):
                n_caught += 1
                break
        assert n_caught, broken.__name__


def test_a_rank_that_goes_on_offering_pages_which_it_has_given_back_shows() -> None:
    for seed in range(400):
        try:
            World(seed, retracts=False).play().check_texts()
        except AssertionError:
            return
    raise AssertionError("nobody noticed")


def halfway() -> tuple[Scheduler, StepPlan, Request]:
    """A request has found pages in the cache that a step in flight is still to fill."""
    sched = Scheduler(PagePool(12, 2), max_step_tokens=16, max_running=4)
    sched.add(Request(1, [1, 2, 3, 4, 5], 4))
    plan = sched.plan()
    req = Request(2, [1, 2, 3, 4, 9], 4)
    assert sched.reserve(req)
    assert req.done == 4
    return sched, plan, req


def test_a_request_that_found_pages_which_were_never_computed_is_computed_from_the_beginning() -> None:
    sched, plan, req = halfway()
    sched.undo(plan)
    sched.adopt(2, 7)
    assert (req.done, req.pages, list(sched.waiting)[-1]) == (0, [], req)


def test_so_is_one_that_was_adopted_before_the_step_was_taken_back() -> None:
    sched, plan, req = halfway()
    sched.adopt(2, 7)
    later = sched.plan()
    assert [s.rid for s in later.slices] == [1, 2]
    sched.undo(later)
    assert req.done == 5
    sched.undo(plan)
    assert (req.done, req.pages, req.inflight) == (0, [], 0)
    assert len(sched.waiting) == 2
    assert sched.pool.n_free == 12


def test_an_adopted_request_keeps_its_pages_when_its_own_steps_are_taken_back() -> None:
    sched = Scheduler(PagePool(12, 2), max_step_tokens=16, max_running=4)
    req = Request(2, [1, 2, 3], 4)
    assert sched.reserve(req)
    assert sched.plan().slices == ()
    sched.adopt(2, 7)
    plan = sched.plan()
    assert [(s.tokens, s.start) for s in plan.slices] == [((7,), 3)]
    sched.undo(plan)
    assert (req.done, len(req.pages)) == (3, 2)
    assert sched.plan() == plan


def test_a_reservation_waits_for_room_and_behind_those_that_were_preempted() -> None:
    sched = Scheduler(PagePool(4, 2), max_step_tokens=16, max_running=2)
    assert sched.reserve(Request(1, [1, 2, 3, 4], 2))
    assert not sched.reserve(Request(2, [5, 6, 7], 2))
    assert sched.abort(1)
    assert sched.reserve(Request(2, [5, 6, 7], 2))
    sched.add(Request(3, [1], 1))
    assert not sched.reserve(Request(4, [1], 1))
    with pytest.raises(ValueError, match="already known"):
        sched.reserve(Request(2, [1], 1))
    with pytest.raises(ValueError, match="needs 5 pages"):
        sched.reserve(Request(5, [1] * 9, 2))


def test_what_ends_with_its_first_token_is_not_adopted_and_holds_nothing() -> None:
    sched = Scheduler(PagePool(4, 2), max_step_tokens=16, max_running=2)
    assert sched.reserve(Request(1, [1, 2, 3, 4], 2, frozenset({7})))
    with pytest.raises(ValueError, match="nothing to adopt"):
        sched.adopt(1, 7)
    assert sched.pool.n_free == 4
    assert not sched.busy


# The table itself ---------------------------------------------------------------------------------------------------


HOLDS = {
    State.QUEUED: set[str](),
    State.COMPUTING: {"decode"},
    State.ROUTED: {"decode"},
    State.PREFILLING: {"prefill", "decode"},
    State.TRANSFERRING: {"prefill", "decode"},
    State.ADOPTING: {"prefill", "decode"},
    State.DECODING: {"decode"},
    State.ENDED: set[str](),
}
"""Which ranks have something of a request in each state."""


@pytest.mark.parametrize(("state", "event"), TABLE)
def test_whoever_holds_something_that_is_not_needed_any_more_is_told(state: State, event: Event) -> None:
    after, actions = TABLE[state, event]
    holds = set(HOLDS[state])
    holds -= {"prefill"} if event in (Event.PREFILL_LOST, Event.FINISHED) else set()
    refused = event is Event.REFUSED and state in (State.ROUTED, State.COMPUTING)
    holds -= {"decode"} if event is Event.DECODE_LOST or refused else set()
    if event is Event.FINISHED and state in (State.DECODING, State.COMPUTING):
        holds = set()
    if (state, event) == (State.PREFILLING, Event.REFUSED):
        holds -= {"prefill"}
    told = {Action.DROP_PREFILL: "prefill", Action.DROP_DECODE: "decode"}
    dropped = {told[a] for a in actions if a in told}
    assert dropped == holds - HOLDS[after]


@pytest.mark.parametrize("state", [s for s in State if s is not State.ENDED])
def test_every_state_has_a_deadline_and_can_be_left_by_its_client(state: State) -> None:
    seconds = Deadlines().of(state)
    assert seconds is not None
    assert seconds > 0
    assert (state, Event.EXPIRED) in TABLE
    assert TABLE[state, Event.LEFT][0] is State.ENDED


def test_a_request_that_loses_its_ranks_again_and_again_fails_in_the_end() -> None:
    handover = Handover(most_lost=3)
    for _ in range(3):
        assert handover.on(Event.PLACED) == (Action.RESERVE,)
        assert handover.on(Event.DECODE_LOST) == (Action.PLACE,)
    handover.on(Event.PLACED)
    handover.on(Event.RESERVED)
    assert handover.on(Event.PREFILL_LOST) == (Action.DROP_DECODE, Action.FAIL)
    assert handover.state is State.ENDED
    with pytest.raises(ValueError, match="a request that is ended cannot be told placed"):
        handover.on(Event.PLACED)


def test_a_lease_ends_once() -> None:
    leases, req = Leases(), Request(1, [1, 2], 1)
    leases.hold(req, 10.0)
    with pytest.raises(ValueError, match="held already"):
        leases.hold(req, 11.0)
    assert leases.expired(9.9) == []
    assert leases.get(1) is req
    assert leases.expired(10.0) == [req]
    assert leases.end(1) is None
    assert len(leases) == 0
