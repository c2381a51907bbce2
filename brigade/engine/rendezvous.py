"""Where hosts find the head of their units. Lets hosts in that agree with it, again after they were gone.

1. open: the head listens on its own address
2. a supervisor calls, proves the secret and states its terms; what differs is shown on both sides, and it is refused
3. wait: all hosts are there, or an error names the missing ones and their ranks
4. a host that is lost later may join again at any time
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from brigade.comm.channel import ChannelBroken
from brigade.comm.handshake import Differs
from brigade.comm.link import Door, Link, LinkLost
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.host_messages import FromSupervisor, Goodbye, Join, Joined, Refusal, Terms
from brigade.engine.output import LoadError
from brigade.engine.remote_host import Guest, RemoteHost
from brigade.engine.terms import (
    clock_difference,
    differences,
    folder_name,
    layout_terms,
    model_terms,
    versions,
)

log = logging.getLogger("brigade.hosts")

AGREE_S = 60.0
"""Seconds that a host has to state its terms: it reads the headers of its checkpoint first."""


def silence(config: EngineConfig) -> float:
    """Seconds without a beat after which a host is lost: soon enough to say so before the ranks' own deadline."""
    return min(2.0, 0.4 * config.rank_deadline)


class Rendezvous:
    """All hosts but the head, with their ranks of all units. Make it with `open`."""

    def __init__(
        self, units: Sequence[EngineConfig], hosts: HostsConfig, names: Sequence[str], terms: Mapping[str, str]
    ) -> None:
        self.units = [_remote(config, hosts, unit) for unit, config in enumerate(units)]
        """Of each unit: its hosts that join, by address."""
        self.guests = [
            Guest(address, {unit: of[address] for unit, of in enumerate(self.units) if address in of}, names)
            for address in hosts.others
        ]
        self._model, self._wait, self._terms = units[0].model, hosts.wait, terms
        self._complete = False
        """Whether all hosts were there once: from then on a refused host is no reason to end."""
        self._closing = False
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._links: set[Link[FromSupervisor]] = set()
        self._crowded: set[str] = set()
        """Hosts that a second supervisor has called for since they joined."""
        self._door: Door[FromSupervisor] = Door(
            hosts.secret, FromSupervisor, min(map(silence, units)), self._on_link, self._on_differs
        )

    @classmethod
    async def open(
        cls, units: Sequence[EngineConfig], hosts: HostsConfig, names: Sequence[str] = ("the unit",)
    ) -> "Rendezvous":
        """Listen for the other hosts. `names`: of the units, for people. Raises LoadError."""
        for config, layout in zip(units, hosts.layouts, strict=True):
            if layout.n_ranks != config.ranks:
                raise LoadError(f"ranks is {config.ranks}, but the layout has {layout.n_ranks}")
        model = await asyncio.to_thread(model_terms, Path(units[0].model))
        rendezvous = cls(units, hosts, names, {**versions(), **layout_terms(hosts.layouts, units, names), **model})
        try:
            await rendezvous._door.open((hosts.here, hosts.port))
        except OSError as e:
            raise LoadError(f"the other hosts cannot be waited for: {e.strerror or e}") from e
        log.info("waiting for %s on %s:%d", ", ".join(g.name for g in rendezvous.guests), *rendezvous._door.address)
        return rendezvous

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._door.address[1]

    async def wait(self) -> None:
        """Until all hosts have joined. Raises LoadError at the deadline, which names who is missing, or when a host of
        the layout was refused."""
        all_there = asyncio.create_task(self._all_there())
        both = (all_there, self._refused)
        done, _ = await asyncio.wait(both, timeout=self._wait, return_when=asyncio.FIRST_COMPLETED)
        all_there.cancel()
        if self._refused in done:
            raise LoadError(self._refused.result())
        if not done:
            missing = ", ".join(g.name for g in self.guests if not g.joined.is_set())
            raise LoadError(f"did not join within {self._wait:g} s: {missing}; run `brigade join` there")
        self._complete = True

    async def _all_there(self) -> None:
        while missing := [guest for guest in self.guests if not guest.joined.is_set()]:
            await missing[0].joined.wait()

    async def close(self, text: str = "the head was ended", failed: bool = False) -> None:
        """Send all hosts away and stop listening."""
        self._closing = True
        for link in self._links:
            link.send(Goodbye(text, failed))
        await asyncio.gather(*(link.close() for link in self._links))
        await self._door.close()
        self._refused.cancel()

    async def _on_link(self, link: Link[FromSupervisor]) -> None:
        self._links.add(link)
        try:
            if guest := await self._agree(link):
                await self._hold(guest, link)
        except (LinkLost, ChannelBroken, TimeoutError) as e:
            log.warning("a host called and did not join: %s", e or f"{link.peer}: it did not state its terms")
        finally:
            await link.close()
            self._links.discard(link)

    async def _agree(self, link: Link[FromSupervisor]) -> Guest | None:
        """The host that the link belongs to; None if it was refused."""
        link.send(Terms(dict(self._terms), time.time(), folder_name(self._model)))
        async with asyncio.timeout(AGREE_S):
            join = await link.receive()
        if not isinstance(join, Join):
            raise ChannelBroken(f"{link.peer}: {type(join).__name__} before Join")
        guest = next((g for g in self.guests if g.address == join.address), None)
        apart = (clock_difference(time.time(), join.clock, join.address), self._differences(join, guest))
        if wrong := "; ".join(filter(None, apart)):
            text = f"host {join.address} cannot be part of this unit: {wrong}"
            link.send(Refusal(text))
            log.error(text)
            if not self._complete and not self._refused.done():
                self._refused.set_result(text)
            return None
        assert guest is not None
        if guest.joined.is_set():
            link.send(Refusal(f"host {join.address} has joined already", again=True))
            if guest.address not in self._crowded:  # it calls again and again
                self._crowded.add(guest.address)
                log.warning("%s called as host %s, which has joined already", link.peer, join.address)
            return None
        link.send(Joined())
        return guest

    def _differences(self, join: Join, guest: Guest | None) -> str:
        if guest is None:
            others = ", ".join(g.address for g in self.guests)
            return f"address: {others or 'no other host'} in the head's layout, {join.address} there"
        return differences(self._terms, join.values, join.address)

    async def _hold(self, guest: Guest, link: Link[FromSupervisor]) -> None:
        log.info("%s joined", guest.name)
        guest.join(link)
        why, unnoticed = "the head was closed", 0.0
        try:
            while True:
                guest.take(await link.receive())
        except (LinkLost, ChannelBroken) as e:
            why, unnoticed = str(e), e.silent if isinstance(e, LinkLost) else 0.0
            log.log(logging.INFO if self._closing else logging.ERROR, "%s is gone: %s", guest.name, why)
        finally:
            self._crowded.discard(guest.address)
            guest.gone(why, unnoticed)

    def _on_differs(self, peer: str, error: Differs) -> None:
        text = f"a host at {peer} cannot be part of this unit: {error}"
        log.error(text)
        if not self._complete and not self._refused.done():
            self._refused.set_result(text)


def _remote(config: EngineConfig, hosts: HostsConfig, unit: int) -> dict[str, RemoteHost]:
    return {
        host.address: RemoteHost(config, hosts.layouts, unit, h, hosts.wait)
        for h, host in enumerate(hosts.layouts[unit].hosts)
        if host.address != hosts.here
    }
