"""Several units as one engine: prompts are computed by prefill units and continued by decode units.

For its callers it is what `Engine` is. Each unit has an Engine of its own, which starts, watches and replaces it; what
a request needs of which unit is a `Flight`. When a unit or a rank is lost its requests go on elsewhere, or when it is
whole again, with the same text: nobody has to ask again.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from brigade.core.handover import Deadlines, Event, State
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig, HostsConfig, KvConfig, Link
from brigade.engine.flight import Flight, RequestPart, Side
from brigade.engine.generation import Generation
from brigade.engine.kv_host import KvHost
from brigade.engine.loads import UnitLoads
from brigade.engine.messages import Loading, Ready, Stats
from brigade.engine.output import Health, LoadError, Observer, QueueFull, Unavailable, Unobserved
from brigade.engine.pulse import added
from brigade.engine.rendezvous import Rendezvous
from brigade.engine.router import Router
from brigade.engine.site import Site
from brigade.spec.layout import Layout, links, on_one_host
from brigade.spec.sampling import SamplingParams

RETRY_EVERY = 0.02
"""Seconds between two looks for a unit, for requests that wait for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Which units a fleet has. Raises ValueError for what cannot work together."""

    prefill: tuple[EngineConfig, ...]
    decode: tuple[EngineConfig, ...]
    link: Link = "shared"
    """How prompts get from one to the other."""
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        if not self.prefill or not self.decode:
            raise ValueError("a fleet needs at least one prefill unit and one decode unit")
        first = self.prefill[0]
        for config in self.units:
            for name in ("model", "dtype", "weights", "page"):
                a, b = getattr(first, name), getattr(config, name)
                if a != b:
                    raise ValueError(f"{name} must be the same in all units of a fleet, not {a!r} and {b!r}")

    @property
    def units(self) -> tuple[EngineConfig, ...]:
        """Those of the prefill units first: every list of a fleet's units has this order."""
        return self.prefill + self.decode

    @property
    def roles(self) -> tuple[Side, ...]:
        sides: tuple[Side, ...] = ("prefill", "decode")
        return tuple(side for side in sides for _ in getattr(self, side))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the units, for people: "prefill 0", "decode 0", "decode 1"."""
        return tuple(f"{role} {self.roles[:i].count(role)}" for i, role in enumerate(self.roles))


class _Pool:
    """The units of one role, their ranks numbered through."""

    def __init__(self, side: Side, engines: Sequence[Engine], configs: Sequence[EngineConfig]) -> None:
        self.side, self.engines = side, list(engines)
        self.at = [
            (engine, rank) for engine, config in zip(engines, configs, strict=True) for rank in range(config.ranks)
        ]
        each = [engine.ready.n_pages // config.ranks for engine, config in zip(engines, configs, strict=True)]
        first = self.engines[0]
        most = min(config.max_running for config in configs)
        self.router = Router(first.spec, len(self.at), most, first.ready.page, min(each), side)

    def up(self) -> list[int]:
        return [i for i, (engine, _) in enumerate(self.at) if engine.up]


class Fleet:
    """Make it with `start`; use it from one event loop."""

    def __init__(self, config: FleetConfig, observer: Observer | None = None) -> None:
        """Reads the small files of the checkpoint. Raises LoadError."""
        self.config_of_fleet = config
        self._observer = observer or Unobserved()
        self.engines = [Engine(unit, self._observer) for unit in config.units]
        one = self.engines[0]
        self.spec, self.tokenizer, self.generation, self.config = one.spec, one.tokenizer, one.generation, one.config
        self.deadlines = config.deadlines
        self.ready: Ready
        self._narrowest: Engine
        self._pools: dict[Side, _Pool] = {}
        self._layouts: tuple[Layout, ...] = ()
        """Of each unit."""
        self._rendezvous: Rendezvous | None = None
        self._kv: KvHost | None = None
        self._flights: dict[int, Flight] = {}
        self._rids = itertools.count()
        self._parked: list[Callable[[], None]] = []
        self._waiting: asyncio.TimerHandle | None = None
        self._draining = self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()
        self.transfers: Counter[str] = Counter()
        """How many prompts were "fetched", and how many "computed" again because they could not be."""
        self.transfer_seconds = 0.0
        """All transfers together."""

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
        fleet = cls(config, observer)
        try:
            await fleet._start(progress or (lambda _: None), hosts)
        except BaseException as e:
            await fleet.close(str(e) if isinstance(e, LoadError) else "")
            raise
        return fleet

    async def _start(self, progress: Callable[[Loading], None], hosts: HostsConfig | None) -> None:
        units = self.config_of_fleet.units
        told = [Loading(0, 0)] * len(units)
        sites = await self._sites(hosts)

        async def start(i: int) -> Engine:
            def tell(loading: Loading) -> None:
                told[i] = loading
                progress(Loading(sum(x.done for x in told), sum(x.total for x in told)))

            kv = KvConfig(role=self.config_of_fleet.roles[i], link=self.config_of_fleet.link)
            return await Engine.start(units[i], progress=tell, observer=self._observer, hosts=sites[i], kv=kv)

        starting = [asyncio.create_task(start(i)) for i in range(len(units))]
        try:
            await asyncio.wait(starting, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in starting:
                task.cancel()  # no more than a word to those that are up
            ends = await asyncio.gather(*starting, return_exceptions=True)
            self.engines = [engine for engine in ends if isinstance(engine, Engine)]
        for name, end in zip(self.config_of_fleet.names, ends, strict=True):
            if isinstance(end, LoadError):
                raise LoadError(f"{name}: {end}") from end  # `close` ends those that are up
        for task in starting:
            task.result()
        self._open_pools()

    async def _sites(self, hosts: HostsConfig | None) -> list[Site]:
        """Where each unit runs; all its hosts are there. Raises LoadError."""
        config = self.config_of_fleet
        if hosts is None:
            layouts = self._layouts = tuple(on_one_host(unit.ranks) for unit in config.units)
            self._kv = KvHost.create(layouts[0].hosts[0].address, layouts)
            return [Site(layout, unit=i, name=config.names[i], kv=self._kv) for i, layout in enumerate(layouts)]
        self._layouts = hosts.layouts
        self._kv = KvHost.create(hosts.here, hosts.layouts, hosts.secret)
        self._rendezvous = await Rendezvous.open(config.units, hosts, config.names)
        await self._rendezvous.wait()
        return [
            Site(layout, self._rendezvous.units[i], hosts.secret, i, config.names[i], self._kv)
            for i, layout in enumerate(hosts.layouts)
        ]

    def _open_pools(self) -> None:
        """All units are up."""
        config = self.config_of_fleet
        for side in ("prefill", "decode"):
            its = [i for i, role in enumerate(config.roles) if role == side]
            self._pools[side] = _Pool(side, [self.engines[i] for i in its], [config.units[i] for i in its])
        self._narrowest = min(self.engines, key=lambda e: e.ready.max_context)
        n = len(config.prefill)
        over = links(self._layouts[:n], self._layouts[n:]) if config.link == "shared" else ("tcp",)
        names = {"shared": "memory of their host", "tcp": "TCP"}
        how = " and ".join(names[link] for link in over)
        notes = [f"{n} prefill and {len(config.decode)} decode units; prompts go from one to the other through {how}"]
        named = zip(config.names, self.engines, strict=True)
        notes += [f"{name}: {note}" for name, engine in named for note in engine.ready.notes]
        n_pages = sum(e.ready.n_pages for e in self.engines)
        self.ready = Ready(n_pages, self._narrowest.ready.page, self._narrowest.ready.max_context, notes)

    async def submit(self, prompt: list[int], params: SamplingParams, salt: str = "") -> Generation:
        """Start one generation. Raises BadRequest, QueueFull and Unavailable as `Engine.submit` does."""
        self.check(params)
        self._narrowest.check_prompt(prompt, params.max_tokens)
        if self._closed or self._draining:
            raise Unavailable("the engine was closed" if self._closed else "shutting down")
        decode = self.config_of_fleet.decode
        if len(self._flights) >= sum(c.ranks * c.max_running for c in decode) + decode[0].max_waiting:
            raise QueueFull(f"{len(self._flights)} requests are running or waiting, which is the limit; try again", 1.0)
        if params.seed is None:
            params = replace(params, seed=random.SystemRandom().getrandbits(62))
        generation = Generation(next(self._rids), len(prompt), params, self.tokenizer, self._observer, self._on_end)
        flight = self._flights[generation.rid] = Flight(self, generation, prompt, salt)
        self._empty.clear()
        flight.begin()
        return generation

    def check(self, params: SamplingParams) -> None:
        """Raise BadRequest, naming the field, for parameters that this model cannot serve."""
        self.engines[0].check(params)

    @property
    def failed(self) -> bool:
        """A bug ended one of the engines: it will not come back."""
        return any(engine.failed for engine in self.engines)

    def health(self) -> Health:
        """Ready while there is a unit of each role that answers."""
        if self._draining:
            return Health(False, "shutting down")
        for side, pool in self._pools.items():
            if not any(engine.up for engine in pool.engines):
                return Health(False, f"no {side} unit: {pool.engines[0].health().reason}")
        return Health(True, "ok")

    def stats(self) -> Stats:
        """The state of all units after their last steps or pings."""
        return added([engine.stats() for engine in self.engines])

    async def expert_loads(self) -> list[UnitLoads]:
        """How busy the routed experts of each unit are; nothing for a model without any. Raises Unavailable if no unit
        can tell."""
        named = zip(self.config_of_fleet.names, self.engines, strict=True)
        units = [u for u in await asyncio.gather(*(_expert_loads(*of) for of in named)) if u]
        if units and not any(u.loads for u in units):
            raise Unavailable("; ".join(f"{u.unit}: {u.problem}" for u in units))
        return units

    def handovers(self) -> tuple[dict[str, int], Counter[str], float]:
        """Requests by state, transfers by how they ended, and how long these took together."""
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

    async def close(self, failure: str = "") -> None:
        """End all units. Generations in flight end with Unavailable. `failure`: why the fleet could not start."""
        self._closed = True
        if self._waiting:
            self._waiting.cancel()
        for flight in list(self._flights.values()):
            flight.close(Unavailable("the engine was closed"))
        await asyncio.gather(*(engine.close() for engine in self.engines))
        if self._rendezvous is not None:
            await self._rendezvous.close(failure or "the head was ended", bool(failure))
        if self._kv is not None:
            self._kv.close()
        self._rendezvous = self._kv = None

    # For flights

    def choose(self, flight: Flight, side: Side, max_new: int) -> RequestPart | None:
        """A rank for a part of a request; None while no unit of that role is there."""
        pool = self._pools[side]
        up = pool.up()
        if not up:
            return None
        rid = next(self._rids)
        at = pool.router.place(rid, flight.tokens, max_new, flight.salt, up)
        engine, rank = pool.at[at]
        return RequestPart(flight, side, rid, engine, rank)

    def lost(self, part: RequestPart) -> None:
        """The rank of this part has lost its cache, or may have: it counts as having no prompt's beginning."""
        pool = self._pools[part.side]
        pool.router.lost(pool.at.index((part.engine, part.rank)))

    def left(self, part: RequestPart) -> None:
        self._pools[part.side].router.ended(part.rid)

    def park(self, again: Callable[[], None]) -> None:
        """Try again when there may be a unit; the request's own deadline ends it."""
        self._parked.append(again)
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().call_later(RETRY_EVERY, self._retry)

    def _retry(self) -> None:
        self._waiting = None
        parked, self._parked = self._parked, []
        for again in parked:
            again()

    def adopted(self, failure: str, seconds: float) -> None:
        self.transfers["computed" if failure else "fetched"] += 1
        self.transfer_seconds += seconds

    def ended(self, flight: Flight) -> None:
        self._flights.pop(flight.generation.rid, None)
        if not self._flights:
            self._empty.set()

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        """The generation has ended by itself; `tell_worker`: before its last token."""
        if tell_worker and (flight := self._flights.get(generation.rid)):
            flight.on(Event.LEFT)


async def _expert_loads(name: str, engine: Engine) -> UnitLoads | None:
    try:
        report = await engine.experts.report()
    except Unavailable as e:
        return UnitLoads(name, None, str(e))
    return UnitLoads(name, report) if report else None


AnyEngine = Engine | Fleet
"""What the server needs: something that answers requests."""
