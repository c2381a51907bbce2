"""Fleets on this machine for scenarios, and what of their inside a test must know: which process is which rank."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, cast

from brigade.core.handover import Event, State
from brigade.core.roles import Side
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.generation import Generation
from brigade.engine.messages import Ping
from brigade.engine.output import Unavailable
from brigade.spec.layout import Role
from brigade.spec.sampling import SamplingParams
from tests.engine.asking import until
from tests.engine.conftest import workers

BASE = EngineConfig(max_step_tokens=64, max_running=16, rank_deadline=20)


def unit(name: str, **engine: Any) -> UnitConfig:
    """`name`: of its role, and a number; `engine`: what it has other than BASE."""
    return UnitConfig(name=name, role=cast(Role, name.partition("-")[0]), engine=replace(BASE, **engine))


def config(*units: UnitConfig, **fleet: Any) -> FleetConfig:
    """Nothing said: one prefill unit and one decode unit."""
    return FleetConfig(units=units or (unit("prefill-0"), unit("decode-0")), **fleet)


@contextlib.asynccontextmanager
async def running(config: FleetConfig) -> AsyncIterator[Fleet]:
    """A fleet that leaves no process behind."""
    before = workers()
    fleet = await Fleet.start(config)
    try:
        yield fleet
    finally:
        await fleet.close()
        assert workers() <= before


async def said(generation: Generation) -> list[int] | str:
    """The tokens of a generation, or its error."""
    try:
        return [t async for delta in generation for t in delta.tokens]
    except Unavailable as e:
        return str(e)


async def ask_all(fleet: Fleet, prompts: list[list[int]], params: SamplingParams) -> list[list[int] | str]:
    """All of them at once."""
    return list(await asyncio.gather(*[said(await fleet.submit(prompt, params)) for prompt in prompts]))


async def all_pages_are_back(fleet: Fleet, seconds: float = 5) -> bool:
    return await until(lambda: not fleet.stats().pages_used and not fleet.stats().running, seconds)


def engines(fleet: Fleet, side: Side | None = None) -> list[Engine]:
    """Of all units, or of those that do this."""
    return [m.engine for m in fleet.crew.members if side in (None, m.role)]


def pids(fleet: Fleet, side: Side | None = None) -> list[int]:
    """The processes of all their ranks."""
    return [
        process.pid
        for engine in engines(fleet, side)
        for host in engine._unit.hosts  # type: ignore[union-attr]
        for process in host.processes.values()  # type: ignore[attr-defined]
    ]


def pid_of(fleet: Fleet, generation: Generation, side: Side) -> int | None:
    """The process that has a part of this request."""
    flight = fleet._flights.get(generation.rid)
    part = flight._parts.get(side) if flight else None
    if part is None:
        return None
    unit = part.unit.engine._unit
    assert unit is not None
    found: int = next(h.processes[part.rank].pid for h in unit.hosts if part.rank in h.ranks)  # type: ignore[attr-defined]
    return found


def state_of(fleet: Fleet, generation: Generation) -> State:
    flight = fleet._flights.get(generation.rid)
    return flight.state if flight else State.ENDED


def when(fleet: Fleet, generation: Generation, event: Event, do: Callable[[], None]) -> None:
    """Do something right before the fleet acts on this event of a request."""
    flight = fleet._flights[generation.rid]
    on = flight.on

    def first(happened: Event) -> None:
        if happened is event:
            flight.on = on  # type: ignore[method-assign]
            do()
        on(happened)

    flight.on = first  # type: ignore[method-assign]


def any_up(fleet: Fleet, side: Side) -> bool:
    return any(engine.up for engine in engines(fleet, side))


def all_up(fleet: Fleet) -> bool:
    return all(engine.up for engine in engines(fleet))


def ask_for_stats(fleet: Fleet) -> None:
    """So that `fleet.stats()` is soon that of now."""
    for engine in engines(fleet):
        if engine._unit is not None:
            for rank in range(engine.config.ranks):
                engine._unit.send(rank, Ping(0))


async def news(fleet: Fleet) -> None:
    """Wait until every rank has said something."""
    pulses = [engine._keeper.pulse for engine in engines(fleet)]
    before = [list(pulse._n_heard) for pulse in pulses]
    ask_for_stats(fleet)

    def all_heard() -> bool:
        return all(all(map(int.__gt__, p._n_heard, n)) for p, n in zip(pulses, before, strict=True))

    assert await until(all_heard, 5)
