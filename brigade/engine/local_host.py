"""The ranks of a unit that run on this machine: their processes and the memory they share. Decides nothing.

`RankHost` is what a unit needs of a machine. Here it is this one; over a network it is a supervisor that wraps one.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from brigade.comm.channel import ChannelBroken, ChannelClosed
from brigade.comm.segment import Segment
from brigade.engine.config import EngineConfig
from brigade.engine.kv_host import KvHost
from brigade.engine.messages import FromWorker, Start, ToWorker
from brigade.engine.output import LoadError
from brigade.engine.process import WorkerProcess
from brigade.spec.layout import Layout
from brigade.spec.model import ModelSpec


@dataclass(frozen=True)
class Ended:
    """The process of a rank is gone. The last thing that is heard of it."""

    how: str
    """Such as "killed by SIGKILL"."""
    unnoticed: float = 0.0
    """Seconds that it may have been gone for before anybody could notice: its host may be cut off."""


class RankHost(Protocol):
    """The ranks of one machine. Used by one unit, from one event loop.

    Life of a rank here: start -> messages -> Ended -> start again, which replaces it in place.
    """

    ranks: range
    """Which ranks of the unit run here."""
    address: str
    """Where ranks of other hosts reach the ranks of this one."""

    async def start(self, start: Start) -> None:
        """Start a process for rank `start.rank`, which has none, and send it `start`, with `segment` set to what the
        ranks here share. Returns when the process runs, not when it has loaded. Raises LoadError if none can be
        started; then there is no Ended."""
        ...

    def send(self, rank: int, *messages: ToWorker) -> None:
        """Queue messages for one rank. They are lost without a word if it has ended or ends before it reads them."""
        ...

    async def receive(self) -> tuple[int, FromWorker | Ended]:
        """The next that is heard of any rank here, in order for each rank; waits for ever.

        Ended follows soon after a process dies, whatever kills it, or sends what is no message; a host that cannot be
        reached any more says so of all its ranks.
        """
        ...

    def stop(self, generation: int, culprits: Iterable[int] = ()) -> None:
        """End all waits of this and older generations, at once. `culprits` are ranks of the unit, here or elsewhere,
        that were lost; survivors name them. Must come before a Form of the next generation."""
        ...

    def kill(self, rank: int) -> None:
        """End a process that cannot go on; Ended follows. Harmless if it has ended."""
        ...

    async def end(self) -> dict[int, str]:
        """End all processes, giving each a moment to leave by itself, and give the memory back. Says how each process
        ended that had not ended before. Nothing may be called afterwards."""
        ...


LOOK_EVERY = 0.3
"""Seconds between two looks for processes that were stopped."""


class LocalHost:
    """This machine as a RankHost. Make it with `create`."""

    def __init__(
        self,
        ranks: range,
        address: str,
        segment: Segment | None,
        secret: bytes = b"",
        kv: KvHost | None = None,
        unit: int = 0,
    ) -> None:
        self.ranks, self.address, self._segment, self._secret = ranks, address, segment, secret
        self._kv, self._unit = kv, unit
        self.processes: dict[int, WorkerProcess] = {}
        self._heard: asyncio.Queue[tuple[int, FromWorker | Ended]] = asyncio.Queue()
        self._ears: dict[int, asyncio.Task[None]] = {}
        self._eye: asyncio.Task[None] | None = None
        self._how: dict[int, str] = {}
        """Ranks that are being killed -> why, where their exit code does not tell."""

    @classmethod
    def create(
        cls,
        config: EngineConfig,
        spec: ModelSpec,
        layout: Layout,
        host: int = 0,
        secret: bytes = b"",
        kv: KvHost | None = None,
        unit: int = 0,
    ) -> "LocalHost":
        """This machine as one host of a layout. Makes the memory that its ranks share; processes come later.

        `secret`: what its ranks and those of other hosts know each other by. `kv`: what they have in common with ranks
        of other units, and which of these `unit` is. Raises LoadError.
        """
        segment = _segment(config, spec, layout, host)
        return cls(layout.ranks(host), layout.hosts[host].address, segment, secret, kv, unit)

    async def start(self, start: Start) -> None:
        rank = start.rank
        if rank in self.processes:
            raise ValueError(f"rank {rank} has a process")
        fd = self._segment.fd if self._segment is not None else -1
        kv = self._kv.of(self._unit, start.kv) if start.kv is not None and self._kv is not None else None
        start = msgspec.structs.replace(start, segment=fd, address=self.address, secret=self._secret, kv=kv)
        process = self.processes[rank] = await WorkerProcess.start(start)
        self._ears[rank] = asyncio.create_task(self._listen(rank, process))
        if self._segment is not None and self._eye is None:
            self._eye = asyncio.create_task(self._look())

    def send(self, rank: int, *messages: ToWorker) -> None:
        if process := self.processes.get(rank):
            process.channel.send(*messages)

    async def receive(self) -> tuple[int, FromWorker | Ended]:
        return await self._heard.get()

    def stop(self, generation: int, culprits: Iterable[int] = ()) -> None:
        if self._segment is not None:
            here = self.ranks.start
            self._segment.stop(generation, [rank - here for rank in culprits if rank in self.ranks])

    def kill(self, rank: int) -> None:
        if process := self.processes.get(rank):
            process.kill()

    async def end(self) -> dict[int, str]:
        senses = [*self._ears.values(), *([self._eye] if self._eye else [])]
        for task in senses:
            task.cancel()
        await asyncio.gather(*senses, return_exceptions=True)
        processes, self.processes = self.processes, {}
        ends = await asyncio.gather(*(process.end() for process in processes.values()))
        if self._segment is not None:
            self._segment.close()
        return dict(zip(processes, ends, strict=True))

    async def _look(self) -> None:
        """End processes that were stopped: others wait for them, and would notice only at their deadline."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            for rank, process in self.processes.items():
                if process.is_stopped():
                    self._how[rank] = "it was stopped by a signal, and killed for that"
                    process.kill()

    async def _listen(self, rank: int, process: WorkerProcess) -> None:
        try:
            while True:
                for message in await process.channel.receive():
                    self._heard.put_nowait((rank, message))
        except ChannelClosed:
            ended = await process.end()
            how = self._how.pop(rank, ended)
        except ChannelBroken as e:
            process.kill()
            await process.end()
            how = f"it sent what is no message ({e})"
        del self.processes[rank]
        self._heard.put_nowait((rank, Ended(how)))


def _segment(config: EngineConfig, spec: ModelSpec, layout: Layout, host: int) -> Segment | None:
    """The memory that the ranks of one host share; None for one rank whose rows are not to be rounded, either.

    With several hosts a rank receives tokens of other hosts for its own, besides its own ones: of one rank of each
    where all hosts are alike, else of all (`brigade.comm.hierarchical`). Raises LoadError.
    """
    if layout.n_ranks == 1 and config.wire == "auto":
        return None
    sizes = layout.sizes
    n_sources = len(sizes) if len(set(sizes)) == 1 else layout.n_ranks
    n_tokens = config.max_step_tokens * (n_sources if len(sizes) > 1 else 1)
    try:
        return Segment.create(sizes[host], n_tokens, spec.dim, spec.moe.top_k if spec.moe else 1)
    except (OSError, ValueError) as e:
        raise LoadError(f"the ranks cannot share memory: {e}") from e
