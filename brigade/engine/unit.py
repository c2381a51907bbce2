"""The ranks of one unit, seen as one: started together, in step, and replaced in place when one is lost.

Life of a unit:
1. Every rank is started and reads its weights: Loading... then Loaded, or Failed.
2. When all have loaded, all get Form with the same generation, meet, and say Ready: the unit is whole.
3. A rank is lost: its process ended, or the others waited for it in vain and name it; then its process is killed. The
   generation is stopped at once, so that nobody waits longer. The others keep weights, pages and requests.
4. A new process for that rank is started: at once, then after ever longer pauses while it fails without having served.
   When it has loaded, all get Form with the next generation: the unit is whole again.
5. When no rank is left that could go on, or while the unit starts, a loss is the end: whoever owns the unit ends it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from brigade.core.placement import Placement
from brigade.engine.config import EngineConfig, KvConfig
from brigade.engine.local_host import Ended, RankHost
from brigade.engine.messages import (
    Adopted,
    Computed,
    Failed,
    Form,
    FromWorker,
    Gone,
    Loaded,
    Loading,
    Loads,
    Lost,
    Offered,
    Pong,
    Ready,
    Refused,
    Reserved,
    Rouse,
    Settled,
    Spans,
    Staged,
    Start,
    Step,
    ToWorker,
)
from brigade.engine.output import LoadError
from brigade.engine.site import Site
from brigade.spec.layout import on_one_host
from brigade.spec.model import ModelSpec

LOAD_SILENCE = 300.0
"""Loading tells of every half per cent; a rank that says nothing for longer than this many seconds is given up."""
LONGEST_PAUSE = 30.0
"""Starts of a rank or a unit that dies without having served are this many seconds apart at most."""


def pause(n_failed: int) -> float:
    """Seconds before the next start, after so many that failed in a row."""
    return min(0.5 * ((1 << min(n_failed, 10)) - 1), LONGEST_PAUSE)


def check_ranks(config: EngineConfig, spec: ModelSpec) -> None:
    """Raise LoadError for a unit with ranks that no expert would be left for."""
    if spec.moe is not None and config.ranks > spec.moe.n_experts:
        raise LoadError(f"ranks is {config.ranks}, but the model has only {spec.moe.n_experts} routed experts a layer")


class UnitLost(ConnectionError):
    """No rank is left that could go on. The message says how the last ones ended."""


class Dismissed(UnitLost):
    """Its owner wants another one."""


@dataclass(frozen=True)
class Broken:
    """A rank was lost, or the process that was to replace it. The others wait for the next one."""

    rank: int
    why: str
    """Names it and says how it ended."""
    unnoticed: float = 0.0
    """Seconds for which nobody could notice it."""


@dataclass(frozen=True)
class Whole:
    """All ranks have met (again)."""

    ready: Ready


Heard = tuple[int, FromWorker] | Broken | Whole
Where = Callable[[], tuple[Placement | None, int]]
"""Which slot holds which expert, and the last portion of moves that this includes. Once asked, it stays until the unit
is whole."""


class Unit:
    """Running ranks on one or several machines. Make it with `start`."""

    def __init__(
        self,
        config: EngineConfig,
        hosts: list[RankHost],
        where: Where = lambda: (None, 0),
        kv: KvConfig | None = None,
    ) -> None:
        self.config, self.hosts, self._where, self._kv = config, hosts, where, kv
        self.generation = 0
        """The one last called for."""
        self.whole = False
        self._stopped = True
        """Whether that generation was stopped, so that the next one is due once all ranks have loaded."""
        self._host = {rank: host for host in hosts for rank in host.ranks}
        self._loaded: dict[int, int] = {}
        """Ranks that have their weights -> the port that they listen on."""
        self._ready: dict[int, Ready] = {}
        self._members: set[int] = set()
        """Ranks that have been part of a whole unit and still run: what is worth waiting for."""
        self._given_up: dict[int, str] = {}
        """Ranks that are ending -> why."""
        self._told: set[int] = set()
        """Ranks whose loss was told and that have no new process yet."""
        self._n_failed = dict.fromkeys(self._host, 0)
        """Processes of a rank that ended one after another without having served."""
        self._heard: asyncio.Queue[tuple[int, FromWorker | Ended]] = asyncio.Queue()
        self._events: asyncio.Queue[Heard | BaseException] = asyncio.Queue()
        self._silence: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        spec: ModelSpec,
        progress: Callable[[Loading], None],
        where: Where = lambda: (None, 0),
        site: Site | None = None,
        kv: KvConfig | None = None,
    ) -> tuple["Unit", Ready]:
        """Start all ranks and wait until they are ready. Raises LoadError; then no process is left.

        `site`: where they run; None: all here.
        """
        check_ranks(config, spec)
        site = site or Site(on_one_host(config.ranks))
        unit = cls(config, site.hosts(config, spec), where, kv)
        try:
            return unit, await unit._first(progress)
        except UnitLost as e:
            await unit.end()
            raise LoadError(str(e)) from e
        except BaseException:
            await unit.end()
            raise

    def send(self, rank: int, *messages: ToWorker) -> None:
        """Queue messages for one rank."""
        self._host[rank].send(rank, *messages)

    async def receive(self) -> Heard:
        """The next message of a rank, or what became of the unit. Raises UnitLost: then it is to be ended."""
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    def kill(self, rank: int, why: str) -> None:
        """Give up a rank that is stuck; Broken follows."""
        self._given_up.setdefault(rank, why)
        self._loaded.pop(rank, None)
        self._host[rank].kill(rank)

    def dismiss(self, why: str) -> None:
        """Have `receive` raise Dismissed after what was heard before."""
        self._events.put_nowait(Dismissed(why))

    async def end(self) -> str:
        """End all processes, at once those that wait for one that is gone, or still load; says how they ended."""
        for timer in self._silence.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for host in self.hosts:
            host.stop(self.generation)
            for rank in host.ranks:
                if rank not in self._loaded:
                    host.kill(rank)  # it would hear of the end after importing torch and reading its weights
        ends = await asyncio.gather(*(host.end() for host in self.hosts))
        how = {rank: text for by_rank in ends for rank, text in by_rank.items()}
        if len(self._host) == 1:
            return how.get(0, "nothing was left")
        return ", ".join(f"rank {rank} {text}" for rank, text in sorted(how.items())) or "nothing was left"

    async def _first(self, progress: Callable[[Loading], None]) -> Ready:
        told = {rank: Loading(0, 0) for rank in self._host}
        for host in self.hosts:
            self._spawn(self._listen(host))
        for rank in self._host:
            await self._start(rank)
        self._spawn(self._work())
        while True:
            match await self.receive():
                case Whole(ready):
                    return ready
                case (rank, message) if isinstance(message, Loading):
                    told[rank] = message
                    progress(Loading(sum(m.done for m in told.values()), sum(m.total for m in told.values())))

    async def _start(self, rank: int) -> None:
        """Start the process of a rank. Raises LoadError."""
        placement, portion = self._where()
        sizes = [len(host.ranks) for host in self.hosts] if len(self.hosts) > 1 else []
        await self._host[rank].start(
            Start(self.config, rank, hosts=sizes, placement=placement, portion=portion, kv=self._kv)
        )
        self._expect(rank)

    async def _listen(self, host: RankHost) -> None:
        while True:
            self._heard.put_nowait(await host.receive())

    async def _work(self) -> None:
        while True:
            rank, message = await self._heard.get()
            self._take(rank, message)

    def _take(self, rank: int, message: FromWorker | Ended) -> None:
        match message:
            case Ended(how, unnoticed):
                self._on_end(rank, how, unnoticed)
            case Loading():
                self._expect(rank)
                self._events.put_nowait((rank, message))
            case Loaded(port):
                self._expect_nothing(rank)
                self._loaded[rank] = port
                self._form_if_due()
            case Ready():
                self._on_ready(rank, message)
            case Failed(text):
                self._given_up.setdefault(rank, text)
            case Lost():
                self._on_lost(message)
            case (
                Step()
                | Pong()
                | Refused()
                | Staged()
                | Settled()
                | Loads()
                | Spans()
                | Reserved()
                | Offered()
                | Computed()
                | Adopted()
                | Gone()
                | Rouse()
            ):
                if isinstance(message, Step) and self.whole:
                    self._n_failed = dict.fromkeys(self._host, 0)
                self._events.put_nowait((rank, message))

    def _form_if_due(self) -> None:
        """Call all ranks together once all have their weights."""
        if not self._stopped or len(self._loaded) < len(self._host):
            return
        self.generation, self._stopped = self.generation + 1, False
        self._ready = {}
        several = len(self.hosts) > 1
        addresses = [f"{self._host[r].address}:{port}" for r, port in sorted(self._loaded.items())] if several else []
        _, portion = self._where()
        for rank in self._host:
            self.send(rank, Form(self.generation, addresses, portion))
            self._expect(rank)

    def _on_ready(self, rank: int, ready: Ready) -> None:
        if ready.generation != self.generation or self._stopped:
            return  # an answer to a call that was taken back meanwhile
        self._expect_nothing(rank)
        self._ready[rank] = ready
        if len(self._ready) == len(self._host):
            self.whole = True
            self._members = set(self._host)
            self._events.put_nowait(Whole(_together([r for _, r in sorted(self._ready.items())])))

    def _on_lost(self, lost: Lost) -> None:
        """A rank waited in vain: those whom it names cannot go on."""
        if lost.generation != self.generation or self._stopped:
            return  # it was told to stop, or waited for one that has been replaced
        self._stop(lost.ranks)
        for rank in lost.ranks:
            self._tell_broken(rank, lost.message, self.config.rank_deadline)  # that long others have waited
            self.kill(rank, lost.message)
        self._form_if_due()  # if it blames nobody, all try again

    def _on_end(self, rank: int, how: str, unnoticed: float) -> None:
        """A process is gone: stop the generation for its sake, and start another one."""
        self._expect_nothing(rank)
        self._loaded.pop(rank, None)
        self._members.discard(rank)
        self._stop([rank])
        why = self._given_up.pop(rank, f"its process ended ({how})")
        if not self._members:
            self._events.put_nowait(UnitLost(self._named(rank, why)))
            return
        self._tell_broken(rank, self._named(rank, why), unnoticed)
        self._spawn(self._replace(rank))

    def _stop(self, culprits: Iterable[int]) -> None:
        if self._stopped:
            return
        self._stopped, self.whole = True, False
        for host in self.hosts:
            host.stop(self.generation, culprits)

    def _tell_broken(self, rank: int, why: str, unnoticed: float = 0.0) -> None:
        if rank not in self._told:
            self._told.add(rank)
            self._events.put_nowait(Broken(rank, why, unnoticed))

    async def _replace(self, rank: int) -> None:
        """Start another process for a rank, again and again if none can be started."""
        while True:
            seconds = pause(self._n_failed[rank])
            self._n_failed[rank] += 1
            await asyncio.sleep(seconds)
            self._told.discard(rank)
            try:
                await self._start(rank)
                return
            except LoadError as e:
                self._tell_broken(rank, self._named(rank, str(e)))

    def _named(self, rank: int, why: str) -> str:
        return why if len(self._host) == 1 else f"rank {rank}: {why}"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            self._events.put_nowait(bug)

    def _expect(self, rank: int) -> None:
        """The rank must be heard within LOAD_SILENCE, or it is given up."""
        self._expect_nothing(rank)
        why = f"loading made no progress for {LOAD_SILENCE:.0f} s"
        self._silence[rank] = asyncio.get_running_loop().call_later(LOAD_SILENCE, self.kill, rank, why)

    def _expect_nothing(self, rank: int) -> None:
        if timer := self._silence.pop(rank, None):
            timer.cancel()


def _together(ready: list[Ready]) -> Ready:
    """What the unit as a whole offers: all pages, the smallest context."""
    notes = ready[0].notes
    if len(ready) > 1:
        notes = [f"{len(ready)} ranks: routed experts spread, attention data-parallel; each of them:", *notes]
    n_pages, context = sum(r.n_pages for r in ready), min(r.max_context for r in ready)
    return Ready(n_pages, ready[0].page, context, notes, ready[0].generation)
