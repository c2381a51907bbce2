"""Where the hosts of a unit find its head. Lets hosts in that agree with it, again after they were gone.

1. open: the head listens on its own address of the layout
2. a supervisor calls, proves the secret and states its terms; what differs is shown on both sides, and it is refused
3. wait: all hosts are there, or an error names the missing ones and their ranks
4. a host that is lost later may join again at any time
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from brigade.comm.channel import ChannelBroken
from brigade.comm.handshake import Differs
from brigade.comm.link import Door, Link, LinkLost
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.host_messages import FromSupervisor, Goodbye, Join, Joined, Refusal, Terms
from brigade.engine.output import LoadError
from brigade.engine.remote_host import RemoteHost
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
    """All other hosts of a unit. Make it with `open`."""

    def __init__(self, config: EngineConfig, hosts: HostsConfig, terms: Mapping[str, str]) -> None:
        self.hosts = [RemoteHost(config, hosts.layout, h, hosts.wait) for h in range(1, len(hosts.layout.hosts))]
        self._config, self._wait, self._layout, self._terms = config, hosts.wait, hosts.layout, terms
        self._complete = False
        """Whether all hosts were there once: from then on a refused host is no reason to end."""
        self._closing = False
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._links: set[Link[FromSupervisor]] = set()
        self._crowded: set[str] = set()
        """Hosts that a second supervisor has called for since they joined."""
        self._door: Door[FromSupervisor] = Door(
            hosts.secret, FromSupervisor, silence(config), self._on_link, self._on_differs
        )

    @classmethod
    async def open(cls, config: EngineConfig, hosts: HostsConfig) -> "Rendezvous":
        """Listen for the other hosts of the layout. Raises LoadError."""
        if hosts.layout.n_ranks != config.ranks:
            raise LoadError(f"ranks is {config.ranks}, but the layout has {hosts.layout.n_ranks}")
        model = await asyncio.to_thread(model_terms, Path(config.model))
        rendezvous = cls(config, hosts, {**versions(), **layout_terms(hosts.layout, config), **model})
        try:
            await rendezvous._door.open((hosts.layout.hosts[0].address, hosts.port))
        except OSError as e:
            raise LoadError(f"the other hosts cannot be waited for: {e.strerror or e}") from e
        log.info("waiting for %s on %s:%d", ", ".join(h.name for h in rendezvous.hosts), *rendezvous._door.address)
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
            missing = ", ".join(h.name for h in self.hosts if not h.joined.is_set())
            raise LoadError(f"did not join within {self._wait:g} s: {missing}; run `brigade join` there")
        self._complete = True

    async def _all_there(self) -> None:
        while missing := [host for host in self.hosts if not host.joined.is_set()]:
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
            if host := await self._agree(link):
                await self._hold(host, link)
        except (LinkLost, ChannelBroken, TimeoutError) as e:
            log.warning("a host called and did not join: %s", e or f"{link.peer}: it did not state its terms")
        finally:
            await link.close()
            self._links.discard(link)

    async def _agree(self, link: Link[FromSupervisor]) -> RemoteHost | None:
        """The host that the link belongs to; None if it was refused."""
        link.send(Terms(dict(self._terms), time.time(), folder_name(self._config.model)))
        async with asyncio.timeout(AGREE_S):
            join = await link.receive()
        if not isinstance(join, Join):
            raise ChannelBroken(f"{link.peer}: {type(join).__name__} before Join")
        host = next((h for h in self.hosts if h.address == join.address), None)
        apart = (clock_difference(time.time(), join.clock, join.address), self._differences(join, host))
        if wrong := "; ".join(filter(None, apart)):
            text = f"host {join.address} cannot be part of this unit: {wrong}"
            link.send(Refusal(text))
            log.error(text)
            if not self._complete and not self._refused.done():
                self._refused.set_result(text)
            return None
        assert host is not None
        if host.joined.is_set():
            link.send(Refusal(f"host {join.address} has joined already", again=True))
            if host.address not in self._crowded:  # it calls again and again
                self._crowded.add(host.address)
                log.warning("%s called as host %s, which has joined already", link.peer, join.address)
            return None
        link.send(Joined())
        return host

    def _differences(self, join: Join, host: RemoteHost | None) -> str:
        if host is None:
            others = ", ".join(h.address for h in self.hosts)
            return f"address: {others or 'no other host'} in the head's layout, {join.address} there"
        return differences(self._terms, join.values, join.address)

    async def _hold(self, host: RemoteHost, link: Link[FromSupervisor]) -> None:
        log.info("%s joined", host.name)
        host.join(link)
        why, unnoticed = "the head was closed", 0.0
        try:
            while True:
                host.take(await link.receive())
        except (LinkLost, ChannelBroken) as e:
            why, unnoticed = str(e), e.silent if isinstance(e, LinkLost) else 0.0
            log.log(logging.INFO if self._closing else logging.ERROR, "%s is gone: %s", host.name, why)
        finally:
            self._crowded.discard(host.address)
            host.gone(why, unnoticed)

    def _on_differs(self, peer: str, error: Differs) -> None:
        text = f"a host at {peer} cannot be part of this unit: {error}"
        log.error(text)
        if not self._complete and not self._refused.done():
            self._refused.set_result(text)
