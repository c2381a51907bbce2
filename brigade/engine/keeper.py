"""Keeps a unit running: starts it, hears it, watches it, replaces it. Knows no requests: those are its owner's.

Life of a unit:
1. started and told what to load; Loading... then Ready, or Failed.
2. up: requests go out, each to one rank; steps come back, and every rank answers pings between steps.
3. broken: a rank died, others waited for it in vain, or nothing came from it for too long (it is stuck and gets
   killed). Generations on it end with Unavailable at once. The others go on when the unit is whole again, or end with
   Unavailable if that takes longer than rank_deadline; new ones wait.
4. lost: no rank is left that could go on. Every generation in flight ends with Unavailable, and a new unit is started:
   at once, then after ever longer pauses.
5. closed: the channels are closed; the processes end by themselves or are killed.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Protocol

from brigade.engine.config import EngineConfig, KvConfig
from brigade.engine.messages import FromWorker, Loading, Ping, Ready, Step, Wake
from brigade.engine.output import LoadError, Observer
from brigade.engine.pulse import Pulse
from brigade.engine.rebalance import Rebalancer
from brigade.engine.site import Site
from brigade.engine.unit import Broken, Dismissed, Unit, UnitLost, Whole, pause
from brigade.spec.layout import on_one_host
from brigade.spec.model import ModelSpec

log = logging.getLogger("brigade.engine")


class Owner(Protocol):
    """Whose requests the unit runs."""

    @property
    def busy(self) -> bool:
        """Whether there are any."""

    def on_new(self, ready: Ready) -> None:
        """A unit is up that knows nothing of one before."""

    def on_message(self, rank: int, message: FromWorker) -> None: ...

    def on_rank_lost(self, rank: int) -> None:
        """It is being replaced; the other ranks wait, and keep what they have."""

    def on_late(self, why: str) -> None:
        """The other ranks have waited for long enough."""

    def on_unit_lost(self) -> None:
        """Nothing is left of it; another one is being started."""


class Keeper:
    """One unit after another. Use it from one event loop."""

    def __init__(
        self,
        owner: Owner,
        config: EngineConfig,
        spec: ModelSpec,
        experts: Rebalancer,
        observer: Observer,
        site: Site | None,
        kv: KvConfig | None,
    ) -> None:
        """`site`: where the unit runs; None: here."""
        self._owner, self._config, self._spec, self._experts = owner, config, spec, experts
        self._observer, self._kv = observer, kv
        self._site = site or Site(on_one_host(config.ranks))
        self._of = f"{self._site.name}: " if self._site.name else ""
        self.unit: Unit | None = None
        self.up = asyncio.Event()
        """Set while requests can be given to its ranks."""
        self.ready: Ready
        self.failure = "the model is being loaded"
        """Why it is not up."""
        self.pulse = Pulse(config)
        self.n_restarts = 0
        """Times that a process was replaced, or all of them."""
        self._wakes = itertools.count(1)
        self._broken_at: dict[int, float] = {}
        """Ranks that were lost since the unit was whole -> when."""
        self._patience: asyncio.TimerHandle | None = None

    async def spawn(self, progress: Callable[[Loading], None]) -> None:
        """Start a unit and wait until it is ready. Raises LoadError."""
        self.unit, self.ready = await Unit.start(
            self._config, self._spec, progress, self._experts.where, self._site, self._kv
        )
        self._owner.on_new(self.ready)
        self.pulse.begin()
        self._experts.up(self.unit.send, self.wake_all)
        self.up.set()

    async def keep_alive(self) -> None:
        """Serve with one unit after another. The first one is up already."""
        n_failed = 0
        while True:
            if self.up.is_set():
                served = await self._serve_unit()
                n_failed = 0 if served else n_failed + 1
            await asyncio.sleep(pause(n_failed))
            self._restarted()
            try:
                await self.spawn(lambda _: None)
                log.warning("%sthe worker was restarted", self._of)
            except LoadError as e:
                n_failed += 1
                self.failure = f"the worker cannot be restarted: {e}"
                log.error("%s%s", self._of, self.failure)
                await self._bury()

    async def watch(self) -> None:
        """Ping every rank; kill one that is stuck, so that nothing waits for it for ever."""
        for seq in itertools.count():
            await asyncio.sleep(self.pulse.every())
            if not self.up.is_set() or self.unit is None:
                self.pulse.rest()
                continue
            for rank in range(self._config.ranks):
                if silent := self.pulse.silent(rank, self._owner.busy):
                    why = f"nothing came from it for {silent:.1f} s"
                    log.error("%s%s: %s; killing it", self._of, self.pulse.who(rank), why)
                    self.unit.kill(rank, why)
                else:
                    self.unit.send(rank, Ping(seq))

    async def restart(self) -> None:
        """End the unit, whose requests are lost, and wait until another one is up. At once for one that is being
        replaced anyway."""
        if self.unit is not None and self.up.is_set():
            self.up.clear()
            self.unit.dismiss("started again as was asked for")
        await self.up.wait()

    def next_wake(self) -> int:
        """The number of a call that has all ranks run steps."""
        return next(self._wakes)

    def wake_all(self) -> None:
        """Have the ranks meet once, asleep or not."""
        if self.unit is not None:
            wake = Wake(self.next_wake())
            for rank in range(self._config.ranks):
                self.unit.send(rank, wake)

    def wait_no_longer(self) -> None:
        """Whoever waits for a unit that is not whole has been told."""
        if self._patience is not None:
            self._patience.cancel()
        self._patience, self._broken_at = None, {}

    async def close(self) -> None:
        """End the unit. Nothing else may run here any more."""
        unit, self.unit = self.unit, None
        if unit is not None:
            await unit.end()

    async def _serve_unit(self) -> bool:
        """Hand messages out until the unit is lost; whether it finished any step."""
        unit, served = self.unit, False
        assert unit is not None
        try:
            while True:
                match await unit.receive():
                    case Broken(rank, why, unnoticed):
                        self._on_broken(rank, why, unnoticed)
                    case Whole(ready):
                        self._on_whole(ready)
                    case (rank, message):
                        served |= isinstance(message, Step)
                        self.pulse.hear(rank, message)
                        self._owner.on_message(rank, message)
        except UnitLost as e:
            self.up.clear()
            self.wait_no_longer()
            self._experts.lost()
            self.pulse.all_lost()
            self.failure = f"the worker process was lost ({e}); it is being restarted"
            # Clients first: finding out why can take a moment.
            self._owner.on_unit_lost()
            level = logging.WARNING if isinstance(e, Dismissed) else logging.ERROR
            log.log(level, "%sthe worker process was lost: %s", self._of, e)
        if ends := await self._bury():
            log.warning("%swhat was left of it was ended: %s", self._of, ends)
        return served

    def _on_broken(self, rank: int, why: str, unnoticed: float) -> None:
        """A rank is lost: its requests end now, those of the others if the unit is not whole again in time."""
        self.up.clear()
        self._experts.lost()
        self.failure = f"{why}; it is being replaced"
        self._owner.on_rank_lost(rank)
        log.error("%slost and being replaced: %s", self._of, why)
        self.pulse.lost(rank)
        self._restarted()
        self._broken_at.setdefault(rank, time.monotonic())
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self._config.rank_deadline - unnoticed, self._give_up_survivors)

    def _give_up_survivors(self) -> None:
        """The other ranks have waited for long enough: their requests end, too. The replacement goes on."""
        self._owner.on_late(f"the unit is not whole again within {self._config.rank_deadline:g} s: {self.failure}")

    def _on_whole(self, ready: Ready) -> None:
        took = time.monotonic() - min(self._broken_at.values())
        log.warning("%sall ranks are there again after %.1f s: replaced %s", self._of, took, sorted(self._broken_at))
        self.wait_no_longer()
        self.ready = ready
        self.pulse.begin()
        if self.unit is not None:
            self._experts.up(self.unit.send, self.wake_all)
        self.up.set()

    def _restarted(self) -> None:
        self.n_restarts += 1
        self._observer.restarted()

    async def _bury(self) -> str:
        """Part with the current unit; says how it ended."""
        self.up.clear()
        unit, self.unit = self.unit, None
        return await unit.end() if unit is not None else ""
