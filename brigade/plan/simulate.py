"""A layout in simulated time: the scheduler and the routing that really run, with step times from the cost model.

1. A request arrives; `core/routing.py` chooses a rank of a prefill (or mixed) unit by what all ranks have to do.
2. Each rank has the real `Scheduler` and `PagePool`; ranks of a unit step together (`core/lockstep.py`), so the busiest
   one sets the pace, and a chunk of somebody's prompt holds up the tokens beside it.
3. With prefill apart, the first token ends the prompt; a decode rank reserves pages, and the cache travels.
4. Each decode step yields as many tokens a request as drafting does on average: its time is divided by them.

It shows what the closed formulas of serving.py leave out: bursts, lengths that differ, prefix hits that come and go,
preemption, and ranks that wait for each other. It knows no more than they do of kernels.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from math import ceil
from random import Random

from brigade.core.lockstep import Shape, agree
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.routing import NewRequest, RankLoad, Weights, choose, pairs
from brigade.core.scheduler import Scheduler, StepPlan
from brigade.plan.arrivals import Arrival
from brigade.plan.memory import memory
from brigade.plan.rates import Calibration
from brigade.plan.search import Layout
from brigade.plan.serving import CHUNK, Pool, accept_of
from brigade.plan.step import decode_step, prefill_step, tokens_per_step
from brigade.spec.layout import Role

PAGE = 256
"""Tokens of a page; larger than a server's, so that long prompts are cheap to simulate."""
MIXED_STEP = 8192
"""Tokens of one step of a rank that prefills and decodes: a common setting."""
MOST_RUNNING = 1024
SPREAD = ("experts", "dispatch", "combine")
"""Terms of a step that all ranks share, however uneven their prompts are."""


class Overload(ValueError):
    """More requests than can be simulated, because the layout falls behind. The message says by how much."""


@dataclass
class Seen:
    """One request's times."""

    arrival: Arrival
    user: int = -1
    first: float = 0.0
    last: float = 0.0
    n_cached: int = 0

    @property
    def ttft(self) -> float:
        return self.first - self.arrival.at

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.arrival.n_out - 1)


@dataclass(frozen=True)
class Simulated:
    """What was seen of requests that arrived after the warm-up and were answered."""

    requests: tuple[Seen, ...]
    seconds: float
    """Of simulated time in which they arrived."""
    in_flight: float
    """Requests in the system on average."""
    n_preempted: int
    n_steps: int

    @property
    def rate(self) -> float:
        return len(self.requests) / self.seconds

    @property
    def hit(self) -> float:
        """Share of prompt tokens found in the cache."""
        return sum(r.n_cached for r in self.requests) / max(1, sum(r.arrival.n_in for r in self.requests))


@dataclass(eq=False)
class _Unit:
    """Ranks that step together."""

    role: Role
    pool: Pool
    ranks: list[Scheduler]
    seconds: Callable[[Sequence[StepPlan]], float]
    last: int = -1
    plans: list[StepPlan] = field(default_factory=list)
    """Of the step that runs; empty: none does."""


class Simulation:
    """One run over a layout. `take` is called with every finished request and gives the next arrivals."""

    def __init__(self, layout: Layout, c: Calibration, seed: int = 1, step_tokens: int = MIXED_STEP) -> None:
        self.c, self.random = c, Random(seed)
        self.units = [_unit(u.role, u.pool, c, step_tokens) for u, k in layout.units for _ in range(k)]
        self.enter = [u for u in self.units if u.role != "decode"]
        self.decode = [u for u in self.units if u.role == "decode"]
        first = self.enter[0].pool
        late = c.ttft_factor(first.engine, first.device.name, apart=bool(self.decode))
        self.door = c.rates.ttft_ms * 1e-3 * late
        self.now, self.n_steps, self.area, self.inside = 0.0, 0, 0.0, 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        self.rids = count()
        self.seen: dict[int, Seen] = {}
        self.finished: list[Seen] = []
        self.queue: deque[tuple[int, Request]] = deque()
        """Requests that no rank has room for."""
        self.hand: deque[tuple[int, _Unit, int, Request]] = deque()
        """Prompts that are computed and wait for a decode rank: rid, unit, rank and request that hold the pages."""
        self.again: Callable[[Seen], Arrival | None] = lambda _: None

    def run(self, arrivals: Iterable[tuple[int, Arrival]], until: float, limit: int = 200_000) -> None:
        """Until simulated second `until`. Raises Overload when more than `limit` requests are inside."""
        for user, a in arrivals:
            self._at(a.at, lambda user=user, a=a: self._arrive(user, a))  # type: ignore[misc]
        while self.events and self.events[0][0] <= until:
            at, _, what = heapq.heappop(self.events)
            self.area += self.inside * (at - self.now)
            self.now = at
            what()
            if self.inside > limit:
                raise Overload(f"after {self.now:.0f} s of simulated time {self.inside} requests wait: ask for fewer")

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def _arrive(self, user: int, a: Arrival) -> None:
        rid = next(self.rids)
        self.seen[rid] = Seen(a, user)
        self.inside += 1
        self._at(self.now + self.door, lambda: self._enter(rid))

    def _enter(self, rid: int) -> None:
        a = self.seen[rid].arrival
        self.queue.append((rid, Request(rid, a.prompt(rid), 1 if self.decode else a.n_out)))
        self._admit()

    def _admit(self) -> None:
        """Gives waiting requests to ranks, first come first served."""
        while self.queue:
            rid, req = self.queue[0]
            found = _choose(self.enter, req, self.seen[rid].arrival.n_out)
            if found is None:
                return
            self.queue.popleft()
            unit, rank = found
            unit.ranks[rank].add(req)
            self._start(unit)

    def _start(self, unit: _Unit) -> None:
        """The next step of a unit that does nothing, if any rank has something to do."""
        if unit.plans:
            return
        plans = [s.plan() for s in unit.ranks]
        if not agree([Shape(p.n_tokens, s.busy, 0) for p, s in zip(plans, unit.ranks, strict=True)]).run:
            return
        unit.plans = plans
        self.n_steps += 1
        self._at(self.now + unit.seconds(plans), lambda: self._commit(unit))

    def _commit(self, unit: _Unit) -> None:
        plans, unit.plans = unit.plans, []
        for rank, (s, plan) in enumerate(zip(unit.ranks, plans, strict=True)):
            for one in plan.slices:
                seen = self.seen[one.rid]
                if one.sample and not seen.first:
                    seen.first = self.now
            for req in s.commit(plan, {x.rid: [0] for x in plan.slices if x.sample}):
                self._ended(unit, rank, req)
        self._admit()
        self._hand_over()
        self._start(unit)

    def _ended(self, unit: _Unit, rank: int, req: Request) -> None:
        seen = self.seen[req.rid]
        if unit.role != "decode":
            seen.n_cached = req.n_cached or 0
        if unit.role == "prefill" and seen.arrival.n_out > 1:
            self.hand.append((req.rid, unit, rank, req))
            return
        unit.ranks[rank].release(req)
        self._done(req.rid)

    def _done(self, rid: int) -> None:
        seen = self.seen.pop(rid)
        seen.last = self.now
        self.inside -= 1
        self.finished.append(seen)
        if (a := self.again(seen)) is not None:
            self._at(a.at, lambda: self._arrive(seen.user, a))

    def _hand_over(self) -> None:
        """Reserves pages on decode ranks for prompts that are computed, in their order."""
        while self.hand:
            rid, source, rank, held = self.hand[0]
            a = self.seen[rid].arrival
            req = Request(rid, a.prompt(rid), a.n_out)
            found = _choose(self.decode, req, a.n_out)
            if found is None or not found[0].ranks[found[1]].reserve(req):
                return
            self.hand.popleft()
            unit, to = found
            rates, f = self.c.rates, unit.pool.f
            link = min(source.pool.device.nic, unit.pool.device.nic) * rates.out
            seconds = rates.transfer * (a.n_in - req.done) * f.kv_bytes / link / source.pool.grid.tp
            self._at(self.now + seconds, lambda s=source, r=rank, h=held, u=unit, t=to: self._adopt(s, r, h, u, t))  # type: ignore[misc]

    def _adopt(self, source: _Unit, rank: int, held: Request, unit: _Unit, to: int) -> None:
        source.ranks[rank].release(held)
        unit.ranks[to].adopt(held.rid, 0)
        self._start(unit)
        self._admit()


def _unit(role: Role, pool: Pool, c: Calibration, step_tokens: int) -> _Unit:
    tokens = memory(pool.f, pool.grid, pool.device, drafts=pool.setup.draft).tokens
    budget = CHUNK if role == "prefill" else step_tokens
    ranks = [
        Scheduler(PagePool(max(1, tokens // PAGE), PAGE), max_step_tokens=budget, max_running=MOST_RUNNING)
        for _ in range(pool.grid.dp)
    ]
    return _Unit(role, pool, ranks, _step_seconds(pool, c))


def _step_seconds(pool: Pool, c: Calibration) -> Callable[[Sequence[StepPlan]], float]:
    """Seconds of a step of all ranks: the busiest decode, and the most prefill, which decodes beside it feel."""
    per = tokens_per_step(pool.setup.draft, accept_of(pool.setup, c.rates))
    decode_factor, prefill_factor = pool.factor(c, "decode") / per, pool.factor(c, "prefill") / pool.grid.pp

    @lru_cache(maxsize=1 << 16)
    def decode(requests: int, context: int) -> float:
        step = decode_step(pool.f, pool.grid, pool.device, c.rates, requests, context, pool.setup)
        return step.seconds * decode_factor

    @lru_cache(maxsize=1 << 16)
    def prefill(tokens: int, mean: int, length: int, before: int) -> float:
        busiest = prefill_step(pool.f, pool.grid, pool.device, c.rates, tokens, length, before, pool.setup)
        even = prefill_step(pool.f, pool.grid, pool.device, c.rates, mean, length, before, pool.setup)
        own = sum(t.seconds for t in busiest.terms if t.name not in SPREAD)
        spread = sum(t.seconds for t in even.terms if t.name in SPREAD)
        share = (own + spread) / sum(t.seconds for t in busiest.terms)
        return busiest.seconds * share * prefill_factor

    def seconds(plans: Sequence[StepPlan]) -> float:
        n_decode, context, chunk, everyone = 0, 0.0, (0, 0, 0), 0
        for plan in plans:
            decodes = [s.end for s in plan.slices if len(s.tokens) == 1]
            if len(decodes) > n_decode:
                n_decode, context = len(decodes), sum(decodes) / len(decodes)
            prompts = [s for s in plan.slices if len(s.tokens) > 1]
            tokens = sum(len(s.tokens) for s in prompts)
            everyone += tokens
            if tokens > chunk[0]:
                chunk = tokens, tokens // len(prompts), sum(s.start for s in prompts) // len(prompts)
        out = decode(n_decode, ceil(context / PAGE) * PAGE) if n_decode else 0.0
        if everyone:
            tokens, length, before = (round(x / 64) * 64 for x in chunk)
            mean = max(1, round(everyone / len(plans) / 16)) * 16
            alone = prefill(max(64, tokens), mean, max(64, length), before)
            out += alone * (c.rates.mixing if n_decode else 1.0)
        return out

    return seconds


def _choose(units: Sequence[_Unit], req: Request, n_new: int) -> tuple[_Unit, int] | None:
    """Unit and rank for a request: the router's choice among all ranks of all units of a role."""
    loads: list[RankLoad] = []
    where: list[tuple[_Unit, int]] = []
    for unit in units:
        for rank, s in enumerate(unit.ranks):
            loads.append(_load(len(where), unit.role, s))
            where.append((unit, rank))
    f = units[0].pool.f
    products = f.cut + f.whole + f.gate + f.n_moe * (f.shared + f.top_k * f.expert)
    weights = Weights(f.prefill_flops / max(1.0, 2 * products), 1 / 4096)
    cached = {}
    for i, (unit, rank) in enumerate(where):
        found, _ = unit.ranks[rank].pool.match(req.tokens)
        if found:
            cached[i] = len(found) * PAGE
    request = NewRequest(req.n_prompt, n_new)
    to = choose(request, loads, weights=weights, cached=cached, last=units[0].last)
    if to is None:
        return None
    units[0].last = to
    return where[to]


def _load(number: int, role: Role, s: Scheduler) -> RankLoad:
    tokens, work, held = 0, 0.0, 0
    for req in s.live.values():
        left = max(0, req.n_prompt - req.done)
        if left:
            tokens += left
            work += pairs(left, req.done)
        held += max(req.n_prompt, req.done)
    held += sum(len(r.tokens) for r in s.arriving.values())
    room = s.pool.n_pages * PAGE
    return RankLoad(number, tokens, work, len(s.live) + len(s.arriving), s.max_running, held, room, role)
