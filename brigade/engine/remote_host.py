"""Another machine as a RankHost: orders go over a link to its supervisor, and what its ranks say comes back.

A machine may have ranks of several units: a RankHost for each of them, over one link. Decides nothing.
Life of a host: joined -> begun (its supervisor has made what its ranks share) -> gone -> joined again.
A host that comes back has nothing: neither processes nor memory; it is told which generations were stopped meanwhile.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from brigade.comm.channel import ChannelBroken
from brigade.comm.link import Link
from brigade.engine.config import EngineConfig
from brigade.engine.host_messages import (
    Begin,
    EndRanks,
    FromSupervisor,
    Heard,
    Join,
    KillRank,
    RankEnded,
    RanksEnded,
    StartRank,
    Stop,
    ToRank,
)
from brigade.engine.local_host import Ended
from brigade.engine.messages import FromWorker, Start, ToWorker
from brigade.engine.output import LoadError
from brigade.spec.layout import Layout

_END_S = 15.0
"""Seconds that a supervisor has to end its processes; it kills them after ten."""


class RemoteHost:
    """One unit's ranks on one host. Outlives units: after `end` it is ready for the next one."""

    def __init__(self, config: EngineConfig, layouts: Sequence[Layout], unit: int, host: int, wait: float) -> None:
        """`host` of the layout of `unit`. `wait`: seconds that starting a rank waits for a host that is gone."""
        self.ranks, self.address = layouts[unit].ranks(host), layouts[unit].hosts[host].address
        self.joined, self._wait, self._unit = asyncio.Event(), wait, unit
        self._begin = Begin(unit, config, [[(h.address, h.n_ranks) for h in layout.hosts] for layout in layouts])
        self._link: Link[FromSupervisor] | None = None
        self._begun = False
        self._reset()

    def _reset(self) -> None:
        self._heard: asyncio.Queue[tuple[int, FromWorker | Ended]] = asyncio.Queue()
        self._running: set[int] = set()
        self._stopped = Stop(self._unit, 0, [])
        self._ends: asyncio.Future[dict[int, str]] | None = None

    @property
    def name(self) -> str:
        """For people: the address and the ranks."""
        return f"host {self.address} ({_numbers(self.ranks)})"

    # The supervisor's side of things: called by whoever holds the link.

    def join(self, link: "Link[FromSupervisor]") -> None:
        """The host is there, with nothing running."""
        self._link, self._begun = link, False
        self.joined.set()

    def take(self, message: FromSupervisor) -> None:
        """Raises ChannelBroken for a message that makes no sense here."""
        match message:
            case Heard(_, rank, said) if rank in self._running:
                self._heard.put_nowait((rank, said))
            case RankEnded(_, rank, how) if rank in self._running:
                self._running.discard(rank)
                self._heard.put_nowait((rank, Ended(how)))
            case RanksEnded(_, how) if self._ends is not None and not self._ends.done():
                self._ends.set_result(how)
            case _:
                raise ChannelBroken(f"unexpected {type(message).__name__}")

    def gone(self, why: str, unnoticed: float = 0.0) -> None:
        """The link is lost, and with it all that ran there; perhaps for so many seconds already."""
        self._link, self._begun = None, False
        self.joined.clear()
        how = f"its host {self.address} is gone: {why}"
        for rank in sorted(self._running):
            self._heard.put_nowait((rank, Ended(how, unnoticed)))
        if self._ends is not None and not self._ends.done():
            self._ends.set_result(dict.fromkeys(self._running, how))
        self._running.clear()

    # RankHost

    async def start(self, start: Start) -> None:
        if start.rank in self._running:
            raise ValueError(f"rank {start.rank} has a process")
        try:
            await asyncio.wait_for(self.joined.wait(), self._wait)
        except TimeoutError:
            raise LoadError(f"{self.name} has been gone for {self._wait:g} s; run `brigade join` there") from None
        assert self._link is not None
        if not self._begun:
            self._begun = True
            self._link.send(self._begin)
            if self._stopped.generation:
                self._link.send(Stop(self._unit, self._stopped.generation, []))
        self._running.add(start.rank)
        self._link.send(StartRank(self._unit, start))

    def send(self, rank: int, *messages: ToWorker) -> None:
        if self._link is not None and rank in self._running:
            self._link.send(ToRank(self._unit, rank, list(messages)))

    async def receive(self) -> tuple[int, FromWorker | Ended]:
        return await self._heard.get()

    def stop(self, generation: int, culprits: Iterable[int] = ()) -> None:
        self._stopped = Stop(self._unit, generation, list(culprits))
        if self._link is not None and self._begun:
            self._link.send(self._stopped)

    def kill(self, rank: int) -> None:
        if self._link is not None and rank in self._running:
            self._link.send(KillRank(self._unit, rank))

    async def end(self) -> dict[int, str]:
        ends: dict[int, str] = {}
        if self._link is not None and self._begun:
            self._ends = asyncio.get_running_loop().create_future()
            self._link.send(EndRanks(self._unit))
            try:
                async with asyncio.timeout(_END_S):
                    ends = await self._ends
            except TimeoutError:
                ends = dict.fromkeys(self._running, f"its host {self.address} does not say how")
                await self._link.close()  # whoever holds it sees to the rest
        self._begun = False
        self._reset()
        return ends


class Guest:
    """A host that joins the head, and its ranks of every unit that has some there."""

    def __init__(self, address: str, by_unit: Mapping[int, RemoteHost], names: Sequence[str]) -> None:
        """`names`: of the units; one alone need not be named."""
        self.address, self.by_unit = address, by_unit
        ranks = [(names[unit], _numbers(host.ranks)) for unit, host in by_unit.items()]
        shown = "; ".join(f"{unit}: {numbers}" if len(names) > 1 else numbers for unit, numbers in ranks)
        self.name = f"host {address} ({shown})"
        """For people."""
        self.joined = asyncio.Event()

    def join(self, link: "Link[FromSupervisor]") -> None:
        """It is there, with nothing running."""
        for host in self.by_unit.values():
            host.join(link)
        self.joined.set()

    def take(self, message: FromSupervisor) -> None:
        """Raises ChannelBroken for a message that makes no sense here."""
        host = None if isinstance(message, Join) else self.by_unit.get(message.unit)
        if host is None:
            raise ChannelBroken(f"unexpected {type(message).__name__}")
        host.take(message)

    def gone(self, why: str, unnoticed: float = 0.0) -> None:
        """The link is lost, and with it all that ran there; perhaps for so many seconds already."""
        self.joined.clear()
        for host in self.by_unit.values():
            host.gone(why, unnoticed)


def _numbers(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
