"""Several units as one engine: prompts are computed by some and continued by others, or units do both.

Each unit has an Engine of its own, which starts, watches and replaces it; what a request needs of which unit is a
`Flight`; which rank gets it, and how units stop and change, is the `Crew`'s. When a unit or a rank is lost its requests
go on elsewhere, or when it is whole again, with the same text: nobody has to ask again. So also with one unit alone.
"""

import asyncio
import itertools
import logging
import random
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from brigade.core.handover import Event, State
from brigade.core.pace import Pace
from brigade.core.roles import Side
from brigade.engine.client import Engine
from brigade.engine.config import HostsConfig
from brigade.engine.crew import Crew, Member
from brigade.engine.fleet_config import FleetConfig
from brigade.engine.fleet_start import Base, start_units
from brigade.engine.flight import Flight, RequestPart
from brigade.engine.generation import Generation
from brigade.engine.loads import UnitLoads
from brigade.engine.messages import Loading, Ready, Stats
from brigade.engine.output import Health, Observer, QueueFull, Unavailable, Unobserved
from brigade.engine.pulse import added
from brigade.engine.shifts import Waits, shift
from brigade.spec.layout import links
from brigade.spec.sampling import SamplingParams

log = logging.getLogger("brigade.fleet")

RETRY_EVERY = 0.02
"""Seconds between two looks for a unit, for requests that wait for one."""
TURN = 0.01
"""Seconds for which requests may be given out before others are heard: with hundreds of ranks each takes 1 ms."""


class Parked(NamedTuple):
    """A request that waits for a unit of a side."""

    priority: int
    rid: int
    side: Side
    flight: Flight
    again: Callable[[], None]


class Fleet:
    """Make it with `start`; use it from one event loop."""

    def __init__(self, base: Base, observer: Observer) -> None:
        """`base`: whose units are up; the fleet closes it."""
        self._base, self._engines, self._observer = base, base.engines, observer
        self.deadlines = base.config.deadlines
        named = zip(base.config.units, base.engines, strict=True)
        self.crew = Crew([Member(u.name, engine, u.role, u.role) for u, engine in named])
        one = self._engines[0]
        self.spec, self.tokenizer, self.generation, self.config = one.spec, one.tokenizer, one.generation, one.config
        self._flights: dict[int, Flight] = {}
        self._rids = itertools.count()
        self._parked: list[Parked] = []
        self._waiting: asyncio.TimerHandle | None = None
        self._draining = self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._pace = Pace()
        self.waits = Waits()
        self._shifting: asyncio.Task[None] | None = None
        if (targets := base.config.targets) is not None:
            self._shifting = asyncio.create_task(shift(self.crew, self.waits, self._flights.values(), targets))
            self._shifting.add_done_callback(_on_bug)
        self.transfers: Counter[str] = Counter()
        """How many prompts were "fetched", and how many "computed" again because they could not be."""
        self.transfer_seconds = 0.0
        """Waited for rows after the first token, all prompts together."""

    @classmethod
    async def start(
        cls,
        config: FleetConfig,
        *,
        progress: Callable[[Loading], None] | None = None,
        observer: Observer | None = None,
        hosts: HostsConfig | None = None,
    ) -> "Fleet":
        """Load the model into all units and return when they can answer. Raises LoadError.

        `hosts`: where each unit of `config.units` runs, and how the others reach this one; None: all run here.
        """
        heard = observer or Unobserved()
        return cls(await start_units(config, hosts, progress or (lambda _: None), heard), heard)

    async def submit(self, prompt: list[int], params: SamplingParams, salt: str = "", priority: int = 0) -> Generation:
        """Start one generation (`params.n` is the caller's business), once there is a unit for it. Lower priorities go
        first.

        Raises BadRequest for values that cannot be served, QueueFull when too many requests run and wait, Unavailable
        when no unit is there in time or the fleet is shutting down.
        """
        self.check(params)
        self._narrowest.check_prompt(prompt, params.max_tokens)
        if self._closed or self._draining:
            raise Unavailable("the engine was closed" if self._closed else "shutting down")
        self._turn_away_if_full()
        if params.seed is None:
            params = replace(params, seed=random.SystemRandom().getrandbits(62))
        generation = Generation(next(self._rids), len(prompt), params, self.tokenizer, self._observer, self._on_end)
        flight = self._flights[generation.rid] = Flight(self, generation, prompt, salt, priority)
        self._empty.clear()
        try:
            flight.begin()
            await flight.placed()
        except BaseException:
            generation.cancel()
            raise
        return generation

    def check(self, params: SamplingParams) -> None:
        """Raise BadRequest, naming the field, for parameters that this model cannot serve."""
        self._engines[0].check(params)

    @property
    def ready(self) -> Ready:
        """All pages, and the context that fits everywhere."""
        if len(self._engines) == 1:
            return self._engines[0].ready
        roles = Counter(m.role for m in self.crew.members)
        over = links(self._base.layouts) if self._base.config.link == "shared" else (self._base.config.link,)
        names = {"shared": "memory of their host", "tcp": "TCP", "nixl": "NIXL"}
        how = " and ".join(names[link] for link in over)
        units = ", ".join(f"{n} {role}" for role, n in roles.items())
        notes = [f"{units} units; prompts go from one to another through {how}"]
        notes += [f"{m.name}: {note}" for m in self.crew.members for note in m.engine.ready.notes]
        narrowest = self._narrowest.ready
        return Ready(sum(e.ready.n_pages for e in self._engines), narrowest.page, narrowest.max_context, notes)

    @property
    def most(self) -> int:
        """Requests that it takes before it turns further ones away."""
        return self.crew.most

    @property
    def failed(self) -> bool:
        """A bug ended one of the engines: it will not come back."""
        return any(engine.failed for engine in self._engines)

    def health(self) -> Health:
        """Ready while a unit that makes progress takes work for each side."""
        problem = "shutting down" if self._draining else self.crew.problem()
        return Health(not problem, problem or "ok")

    def stats(self) -> Stats:
        """The state of all units after their last steps or pings."""
        return added([engine.stats() for engine in self._engines])

    async def expert_loads(self) -> list[UnitLoads]:
        """How busy the routed experts of each unit are; nothing for a model without any. Raises Unavailable if no unit
        can tell."""
        units = [u for u in await asyncio.gather(*(_expert_loads(m) for m in self.crew.members)) if u]
        if units and not any(u.loads for u in units):
            raise Unavailable("; ".join(f"{u.unit}: {u.problem}" for u in units))
        return units

    def handovers(self) -> tuple[dict[str, int], Counter[str], float]:
        """Requests by state, transfers by how they ended, and how long they were waited for after the first token."""
        return self.states(), self.transfers, self.transfer_seconds

    def states(self) -> dict[str, int]:
        """How many requests are in each state of a hand-over."""
        n = Counter(flight.state for flight in self._flights.values())
        return {state.value: n[state] for state in State if state is not State.ENDED}

    def drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._draining = True

    async def idle(self, deadline: float) -> bool:
        """Wait until nothing is in flight, at most `deadline` seconds; whether it is so."""
        try:
            await asyncio.wait_for(self._empty.wait(), deadline)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End all units. Generations in flight end with Unavailable."""
        self._closed = True
        if self._waiting:
            self._waiting.cancel()
        if self._shifting:
            self._shifting.cancel()
        for flight in list(self._flights.values()):
            flight.close(Unavailable("the engine was closed"))
        await self.crew.close()
        await self._base.close()

    # For flights

    def choose(self, flight: Flight, side: Side, max_new: int) -> RequestPart | None:
        """A rank for a part of a request; None while no unit of that side is there."""
        part = self.crew.choose(flight, side, next(self._rids), max_new)
        if part is not None:
            self._observer.placed(flight.generation.rid, part.rid)
        return part

    def moved(self, flight: Flight) -> None:
        """A request has come to another state."""
        self._observer.moved(flight.generation.rid, flight.state)

    def park(self, flight: Flight, side: Side, again: Callable[[], None]) -> None:
        """Try again when there is a unit of this side, the most urgent requests first; their own deadlines end them."""
        one = Parked(flight.priority, flight.generation.rid, side, flight, again)
        insort(self._parked, one, key=lambda p: p[:2])
        self._look_again(RETRY_EVERY)

    def _look_again(self, seconds: float) -> None:
        if self._parked and self._waiting is None:
            self._waiting = asyncio.get_running_loop().call_later(seconds, self._retry)

    def _retry(self) -> None:
        """Looks for units, not at each request: thousands may wait while a unit starts, which needs the time. When it
        is there they are given to it in turns, between which everybody else is heard."""
        self._waiting = None
        there, until, n = self.crew.there, time.monotonic() + TURN, 0
        parked = [one for one in self._parked if one.flight.state is not State.ENDED]
        todo = [one for one in parked if one.side in there]
        self._parked = [one for one in parked if one.side not in there]
        while n < len(todo) and time.monotonic() < until:
            todo[n].again()
            n += 1
        self._parked = sorted([*self._parked, *todo[n:]], key=lambda p: p[:2])
        self._look_again(0.0 if todo[n:] else RETRY_EVERY)

    def adopted(self, failure: str, seconds: float) -> None:
        self.transfers["computed" if failure else "fetched"] += 1
        self.transfer_seconds += seconds

    def ended(self, flight: Flight) -> None:
        if self._flights.pop(flight.generation.rid, None) is not None:
            self._pace.ended(time.monotonic())
        if not self._flights:
            self._empty.set()

    @property
    def _narrowest(self) -> Engine:
        return min(self._engines, key=lambda e: e.ready.max_context)

    def _turn_away_if_full(self) -> None:
        if len(self._flights) < self.most:
            return
        seconds = self._pace.turn_away(time.monotonic())
        raise QueueFull(f"{len(self._flights)} requests are running or waiting, which is the limit; try again", seconds)

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        """The generation has ended by itself; `tell_worker`: before its last token."""
        if tell_worker and (flight := self._flights.get(generation.rid)):
            flight.on(Event.LEFT)


async def _expert_loads(member: Member) -> UnitLoads | None:
    try:
        report = await member.engine.experts.report()
    except Unavailable as e:
        return UnitLoads(member.name, None, str(e))
    return UnitLoads(member.name, report) if report else None


def _on_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (bug := task.exception()) is not None:
        log.error("units change their roles no more", exc_info=bug)
