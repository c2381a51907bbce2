"""The worker processes of one unit, seen as one: started together, heard together, lost together.

A step of one rank is a step of all, so a unit that has lost a rank cannot go on. Whoever owns the unit ends it and
starts another one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from brigade.comm.channel import ChannelBroken, ChannelClosed
from brigade.comm.segment import FIRST_GENERATION, Segment
from brigade.engine.config import EngineConfig
from brigade.engine.messages import FromWorker, Loading, Lost, Ready
from brigade.engine.output import LoadError
from brigade.engine.process import WorkerProcess
from brigade.spec.model import ModelSpec

T = TypeVar("T")


class RankLost(ConnectionError):
    """A rank died, fell silent or sent what is no message. The message names it."""


class Unit:
    """Running workers, one a rank. Make it with `start`."""

    def __init__(self, workers: list[WorkerProcess], segment: Segment | None) -> None:
        self.workers, self._segment = workers, segment
        self._heard: asyncio.Queue[tuple[int, FromWorker | Exception]] = asyncio.Queue()
        self._ears: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls, config: EngineConfig, spec: ModelSpec, progress: Callable[[Loading], None]
    ) -> tuple["Unit", Ready]:
        """Start all ranks and wait until they are ready. Raises LoadError; then no process is left."""
        segment = _segment(config, spec)
        unit = cls([], segment)
        try:
            for rank in range(config.ranks):
                unit.workers.append(await WorkerProcess.start(config, rank, segment.fd if segment else -1))
            told = [Loading(0, 0)] * config.ranks

            def tell(rank: int, message: Loading) -> None:
                told[rank] = message
                progress(Loading(sum(m.done for m in told), sum(m.total for m in told)))

            ready = await _all([w.ready(lambda m, r=r: tell(r, m)) for r, w in enumerate(unit.workers)])  # type: ignore[misc]
        except BaseException:
            await unit.end()
            raise
        unit._ears = [asyncio.create_task(unit._listen(rank)) for rank in range(config.ranks)]
        return unit, _together(ready)

    def send(self, rank: int, *messages: Any) -> None:
        """Queue messages for one rank."""
        self.workers[rank].channel.send(*messages)

    async def receive(self) -> tuple[int, FromWorker]:
        """The next message and its rank. Raises RankLost, which says who is to blame."""
        rank, message = await self._heard.get()
        if isinstance(message, Exception):
            raise RankLost(f"rank {rank}: {message}" if len(self.workers) > 1 else str(message)) from message
        if isinstance(message, Lost):
            raise RankLost(message.message)
        return rank, message

    async def _listen(self, rank: int) -> None:
        try:
            while True:
                for message in await self.workers[rank].channel.receive():
                    self._heard.put_nowait((rank, message))
        except (ChannelClosed, ChannelBroken) as e:
            self._heard.put_nowait((rank, e))

    def kill(self) -> None:
        """End processes that cannot go on; their channels will close."""
        for worker in self.workers:
            worker.kill()

    async def end(self) -> str:
        """End all processes, at once those that wait for one that is gone; says how they ended."""
        for ear in self._ears:
            ear.cancel()
        if self._segment is not None:
            self._segment.stop(FIRST_GENERATION)
        ends = await asyncio.gather(*(worker.end() for worker in self.workers))
        if self._segment is not None:
            self._segment.close()
        return ends[0] if len(ends) == 1 else ", ".join(f"rank {rank} {how}" for rank, how in enumerate(ends))


def _segment(config: EngineConfig, spec: ModelSpec) -> Segment | None:
    """The memory that the ranks share; None for a unit of one. Raises LoadError."""
    if config.ranks == 1:
        return None
    if spec.moe is not None and config.ranks > spec.moe.n_experts:
        raise LoadError(f"ranks is {config.ranks}, but the model has only {spec.moe.n_experts} routed experts a layer")
    try:
        return Segment.create(config.ranks, config.max_step_tokens, spec.dim, spec.moe.top_k if spec.moe else 1)
    except (OSError, ValueError) as e:
        raise LoadError(f"the ranks cannot share memory: {e}") from e


def _together(ready: list[Ready]) -> Ready:
    """What the unit as a whole offers: all pages, the smallest context."""
    notes = ready[0].notes
    if len(ready) > 1:
        notes = [f"{len(ready)} ranks: routed experts spread, attention data-parallel; each of them:", *notes]
    n_pages, context = sum(r.n_pages for r in ready), min(r.max_context for r in ready)
    return Ready(n_pages, ready[0].page, context, notes)


async def _all(waiting: list[Awaitable[T]]) -> list[T]:
    """Results of all, or the first exception, with the rest cancelled."""
    tasks = [asyncio.ensure_future(w) for w in waiting]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
