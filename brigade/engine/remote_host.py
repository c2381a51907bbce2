"""Another machine as a RankHost: orders go over a link to its supervisor, and what its ranks say comes back.

Decides nothing. Life of a host: joined -> begun (its supervisor has made what its ranks share) -> gone -> joined again.
A host that comes back has nothing: neither processes nor memory; it is told which generations were stopped meanwhile.
"""

import asyncio
from collections.abc import Iterable

from brigade.comm.channel import ChannelBroken
from brigade.comm.link import Link
from brigade.engine.config import EngineConfig
from brigade.engine.host_messages import (
    Begin,
    EndRanks,
    FromSupervisor,
    Heard,
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
    """One host of the layout. Outlives units: after `end` it is ready for the next one."""

    def __init__(self, config: EngineConfig, layout: Layout, host: int, wait: float) -> None:
        """`wait`: seconds that starting a rank waits for a host that is gone."""
        self.ranks, self.address = layout.ranks(host), layout.hosts[host].address
        self.joined, self._wait = asyncio.Event(), wait
        self._begin = Begin(config, [(h.address, h.n_ranks) for h in layout.hosts], host)
        self._link: Link[FromSupervisor] | None = None
        self._begun = False
        self._reset()

    def _reset(self) -> None:
        self._heard: asyncio.Queue[tuple[int, FromWorker | Ended]] = asyncio.Queue()
        self._running: set[int] = set()
        self._stopped = Stop(0, [])
        self._ends: asyncio.Future[dict[int, str]] | None = None

    @property
    def name(self) -> str:
        """For people: the address and the ranks."""
        first, last = self.ranks[0], self.ranks[-1]
        return f"host {self.address} ({f'rank {first}' if first == last else f'ranks {first} to {last}'})"

    # The supervisor's side of things: called by whoever holds the link.

    def join(self, link: "Link[FromSupervisor]") -> None:
        """The host is there, with nothing running."""
        self._link, self._begun = link, False
        self.joined.set()

    def take(self, message: FromSupervisor) -> None:
        """Raises ChannelBroken for a message that makes no sense here."""
        match message:
            case Heard(rank, said) if rank in self._running:
                self._heard.put_nowait((rank, said))
            case RankEnded(rank, how) if rank in self._running:
                self._running.discard(rank)
                self._heard.put_nowait((rank, Ended(how)))
            case RanksEnded(how) if self._ends is not None and not self._ends.done():
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
                self._link.send(Stop(self._stopped.generation, []))
        self._running.add(start.rank)
        self._link.send(StartRank(start))

    def send(self, rank: int, *messages: ToWorker) -> None:
        if self._link is not None and rank in self._running:
            self._link.send(ToRank(rank, list(messages)))

    async def receive(self) -> tuple[int, FromWorker | Ended]:
        return await self._heard.get()

    def stop(self, generation: int, culprits: Iterable[int] = ()) -> None:
        self._stopped = Stop(generation, list(culprits))
        if self._link is not None and self._begun:
            self._link.send(self._stopped)

    def kill(self, rank: int) -> None:
        if self._link is not None and rank in self._running:
            self._link.send(KillRank(rank))

    async def end(self) -> dict[int, str]:
        ends: dict[int, str] = {}
        if self._link is not None and self._begun:
            self._ends = asyncio.get_running_loop().create_future()
            self._link.send(EndRanks())
            try:
                async with asyncio.timeout(_END_S):
                    ends = await self._ends
            except TimeoutError:
                ends = dict.fromkeys(self._running, f"its host {self.address} does not say how")
                await self._link.close()  # whoever holds it sees to the rest
        self._begun = False
        self._reset()
        return ends
