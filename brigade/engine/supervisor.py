"""The supervisor of one host: joins the head, runs ranks under its orders, and joins again when it was cut off.

One supervisor serves all units that have ranks on its host.

Life of a supervisor:
1. call the head until it answers, at most `wait` seconds
2. agree with it (`brigade.engine.terms`); a refusal ends the supervisor
3. start, stop and end ranks as told; what they say goes to the head
4. the head is gone or silent: all ranks end at once, and the supervisor goes back to 1
5. the head says goodbye: the ranks end, and so does the supervisor

It starts with nothing after every loss: the others have formed without its ranks, so nothing that they hold is of use.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from brigade.comm.channel import ChannelBroken
from brigade.comm.handshake import Refused
from brigade.comm.link import Link, LinkLost, call, checked_secret
from brigade.comm.meeting import Address
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.host_messages import (
    Begin,
    EndRanks,
    Goodbye,
    Heard,
    Join,
    Joined,
    KillRank,
    RankEnded,
    RanksEnded,
    Refusal,
    StartRank,
    Stop,
    Terms,
    ToRank,
    ToSupervisor,
)
from brigade.engine.kv_host import KvHost
from brigade.engine.local_host import Ended, LocalHost
from brigade.engine.messages import Failed, Start
from brigade.engine.output import LoadError
from brigade.engine.terms import model_terms, versions
from brigade.spec.config import BadConfig, read_spec
from brigade.spec.layout import Host, Layout

log = logging.getLogger("brigade.supervisor")

SILENCE_S = 2.0
"""Seconds without a beat after which the head counts as gone."""
_CALL_S = 1.0
"""A call across a cut cable is not answered at all; a short wait finds the head soon after the cable is back."""
_RETRY_S = 0.2
_ANSWER_S = 10.0
_TAKEN_S = 0.5
"""Between two tries while the head has a host with this address: often this one, before it was cut off."""


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """How one host joins its head. Raises ValueError for values that cannot work."""

    head: Address
    address: str
    """This host's address in the head's layout; its ranks listen on it."""
    secret: bytes = field(repr=False)
    model: str = ""
    """This host's copy of the model; empty: the same folder as on the head."""
    wait: float = 600.0
    """Seconds that it calls a head that does not answer, at the start and after each loss; 0: for ever."""
    terms: Mapping[str, str] = field(default_factory=dict)
    """What this host expects of the head by `terms.layout_terms`, if it knows: from its own deployment file."""

    def __post_init__(self) -> None:
        checked_secret(self.secret)
        if not self.wait >= 0:
            raise ValueError(f"wait must be 0 or more seconds, not {self.wait}")


class HostRefused(Exception):
    """This host and the head do not agree, or have another secret. Trying again does not help."""


class HeadMissing(Exception):
    """No head answered in time, or it had another supervisor for this host all the while."""


class _Taken(Exception):
    """The head has a host with this address."""


async def supervise(config: JoinConfig) -> Goodbye:
    """Run the ranks of this host until the head ends. Raises HostRefused, HeadMissing; no process is left then."""
    taken: float | None = None
    while True:
        link = await _reach(config, say=taken is None)
        try:
            folder = await _agree(config, link)
            log.info("joined the head at %s", link.peer)
            taken = None
            return await _Ranks(config, folder, link).obey()
        except _Taken as e:
            if taken is None:
                taken = time.monotonic()
                log.warning("%s; waiting for that one to go: is another `brigade join` for this host running?", e)
            if config.wait and time.monotonic() - taken >= config.wait:
                raise HeadMissing(f"{e}, and did not go for {config.wait:g} s; end it, or this one") from e
            await asyncio.sleep(_TAKEN_S)
        except (LinkLost, ChannelBroken) as e:
            log.error("the head is gone, and the ranks of this host were ended: %s", e)
        except TimeoutError:
            log.warning("the head at %s does not go on; calling it again", link.peer)
        finally:
            await link.close()
        await asyncio.sleep(_RETRY_S)


async def _reach(config: JoinConfig, say: bool = True) -> Link[Any]:
    began, where = time.monotonic(), f"the head at {config.head[0]}:{config.head[1]}"
    log.log(logging.INFO if say else logging.DEBUG, "calling %s", where)
    while True:
        try:
            return await call(config.head, config.secret, ToSupervisor, silence=SILENCE_S, deadline=_CALL_S)
        except Refused as e:
            raise HostRefused(f"{where}: {e}") from e
        except OSError as e:
            if config.wait and time.monotonic() - began >= config.wait:
                raise HeadMissing(f"{where} did not answer for {config.wait:g} s: {e}") from e
        await asyncio.sleep(_RETRY_S)


async def _agree(config: JoinConfig, link: Link[Any]) -> Path:
    """Come to terms with the head; the model folder of this host. Raises HostRefused, LinkLost, TimeoutError, and
    _Taken while the head has this host from somewhere else."""
    async with asyncio.timeout(_ANSWER_S):
        terms = await link.receive()
    if not isinstance(terms, Terms):
        raise ChannelBroken(f"{link.peer}: {type(terms).__name__} before Terms")
    folder = Path(config.model or terms.model or DEMO_MODEL)
    values = {**versions(), **config.terms, **await asyncio.to_thread(model_terms, folder)}
    link.send(Join(config.address, values, time.time()))
    async with asyncio.timeout(_ANSWER_S):
        answer = await link.receive()
    match answer:
        case Joined():
            return folder
        case Refusal(text, again=False):
            raise HostRefused(text)
        case Refusal(text):
            raise _Taken(text)
        case Goodbye(text):
            raise LinkLost(f"{link.peer}: {text}")
    raise ChannelBroken(f"{link.peer}: {type(answer).__name__} before Joined")


class _Unit:
    """One unit's ranks here, as long as it lives."""

    def __init__(self, number: int, config: EngineConfig, link: Link[Any]) -> None:
        self.number, self.config, self._link = number, config, link
        self.host: LocalHost | None = None
        self.why_not = ""
        """Why there is no host."""
        self._ear: asyncio.Task[None] | None = None

    def begin(self, host: LocalHost) -> None:
        self.host = host
        self._ear = asyncio.create_task(self._listen(host))

    async def start(self, start: Start, name: str) -> None:
        try:
            if self.host is None:
                raise LoadError(f"host {name}: {self.why_not}")
            await self.host.start(msgspec.structs.replace(start, config=self.config))
        except LoadError as e:
            failed = Heard(self.number, start.rank, Failed(str(e)))
            self._link.send(failed, RankEnded(self.number, start.rank, "it was not started"))

    def kill(self) -> None:
        if self.host is not None:
            for rank in self.host.ranks:
                self.host.kill(rank)

    async def end(self) -> dict[int, str]:
        """End all processes; says how each ended."""
        host, self.host = self.host, None
        if self._ear is not None:
            self._ear.cancel()
            await asyncio.gather(self._ear, return_exceptions=True)
        return await host.end() if host is not None else {}

    async def _listen(self, host: LocalHost) -> None:
        while True:
            rank, said = await host.receive()
            of = self.number, rank
            self._link.send(RankEnded(*of, said.how) if isinstance(said, Ended) else Heard(*of, said))


class _Ranks:
    """What runs here for one head, as long as the link to it holds."""

    def __init__(self, config: JoinConfig, folder: Path, link: Link[Any]) -> None:
        self._config, self._folder, self._link = config, folder, link
        self._units: dict[int, _Unit] = {}
        self._ending: dict[int, asyncio.Task[None]] = {}
        self._kv: KvHost | None = None

    async def obey(self) -> Goodbye:
        """Do as told until the head says goodbye. Raises LinkLost, ChannelBroken. Nothing runs afterwards."""
        try:
            while True:
                order = await self._link.receive()
                if isinstance(order, Goodbye):
                    return order
                await self._do(order)
        finally:
            for unit in self._units.values():
                unit.kill()  # they may wait for ranks of other hosts; nobody needs them any more
            await asyncio.gather(*self._ending.values(), *(unit.end() for unit in self._units.values()))
            if self._kv is not None:
                self._kv.close()

    async def _do(self, order: ToSupervisor) -> None:
        match order:
            case Begin(number, config, layouts):
                await self._end(number)
                self._begin(number, config, [Layout(tuple(Host(*host) for host in hosts)) for hosts in layouts])
            case StartRank(number, start) if unit := self._units.get(number):
                await unit.start(start, self._config.address)
            case EndRanks(number):
                # Meanwhile the other units go on.
                self._ending[number] = asyncio.create_task(self._end_and_tell(number))
            case ToRank(number) | Stop(number) | KillRank(number) if unit := self._units.get(number):
                _tell(unit.host, order)
            case ToRank() | Stop() | KillRank():
                return  # its unit is being ended
            case _:
                raise ChannelBroken(f"{self._link.peer}: unexpected {type(order).__name__}")

    def _begin(self, number: int, config: EngineConfig, layouts: list[Layout]) -> None:
        config = replace(config, model=str(self._folder))
        unit = self._units[number] = _Unit(number, config, self._link)
        address, secret = self._config.address, self._config.secret
        try:
            layout = layouts[number]
            host = next(h for h, host in enumerate(layout.hosts) if host.address == address)
            if self._kv is None and len(layouts) > 1:
                self._kv = KvHost.create(address, layouts, secret)
            spec = read_spec(self._folder, config.drafts)
            unit.begin(LocalHost.create(config, spec, layout, host, secret, self._kv, number))
        except (BadConfig, LoadError) as e:
            unit.why_not = str(e)
        except (IndexError, StopIteration):
            raise ChannelBroken(f"{self._link.peer}: unit {number} has no ranks on {address}") from None

    async def _end_and_tell(self, number: int) -> None:
        self._link.send(RanksEnded(number, await self._end(number)))

    async def _end(self, number: int) -> dict[int, str]:
        unit = self._units.pop(number, None)
        return await unit.end() if unit else {}


def _tell(host: LocalHost | None, order: ToRank | Stop | KillRank) -> None:
    if host is None:
        return  # its memory could not be made, so nothing runs; StartRank says why
    match order:
        case ToRank(_, rank, messages):
            host.send(rank, *messages)
        case Stop(_, generation, culprits):
            host.stop(generation, culprits)
        case KillRank(_, rank):
            host.kill(rank)
