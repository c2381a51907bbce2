"""When each rank of a unit was heard, and what it said of itself: whether they are well. Sends and kills nothing."""

import time
from collections.abc import Sequence
from functools import reduce

import msgspec

from brigade.engine.config import EngineConfig
from brigade.engine.messages import FromWorker, Pong, Stats, Step, StoreStats

PING_EVERY = 0.5
PING_DEADLINE = 5.0
"""An idle worker that has not answered for this many seconds is not ready."""
READY_STEP_DEADLINE = 10.0
"""A busy worker that has not finished a step for this many seconds is not ready."""

_IDLE = Stats(0, 0, 0, 0, 0)


def added(stats: Sequence[Stats]) -> Stats:
    """Of several ranks: sums, but steps are those of the busiest."""
    numbers = [name for name in Stats.__struct_fields__ if name not in ("n_steps", "store")]
    sums = {name: sum(getattr(s, name) for s in stats) for name in numbers}
    stores = [s.store for s in stats if s.store is not None]
    store = reduce(StoreStats.__add__, stores) if stores else None
    return msgspec.structs.replace(stats[0], **sums, n_steps=max(s.n_steps for s in stats), store=store)


class Pulse:
    """Of the ranks of one unit, while it is up."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.stats = [_IDLE] * config.ranks
        """Of each rank, after its last step or ping."""
        self._n_heard = [0] * config.ranks
        self._heard = [0.0] * config.ranks
        self._stepped = 0.0
        self._n_heard_before = [-1] * config.ranks
        self._n_silent = [0] * config.ranks

    def begin(self) -> None:
        """All ranks have met now."""
        self._stepped = time.monotonic()
        self._heard = [self._stepped] * self._config.ranks

    def before_work(self) -> None:
        """A request is about to be given out: an idle unit makes no steps, so they count from now."""
        if not self.working:
            self._stepped = time.monotonic()

    @property
    def working(self) -> bool:
        """Whether a rank has something to run, as far as it has said."""
        return any(s.running or s.waiting for s in self.stats)

    def hear(self, rank: int, message: FromWorker) -> None:
        self._heard[rank] = time.monotonic()
        self._n_heard[rank] += 1
        if isinstance(message, Step | Pong):
            if isinstance(message, Step) or not self.working:  # what begins now need not have made a step before
                self._stepped = self._heard[rank]
            self.stats[rank] = message.stats

    def lost(self, rank: int) -> None:
        self.stats[rank] = _IDLE

    def all_lost(self) -> None:
        self.stats = [_IDLE] * self._config.ranks

    def problem(self, busy: bool) -> str:
        """What speaks against giving it requests; empty while steps make progress, or while ranks that have nothing to
        run answer pings. `busy`: it has requests, which may still wait for something from elsewhere."""
        now, patience = time.monotonic(), min(READY_STEP_DEADLINE, self._config.step_deadline)
        if self.working:
            return f"no step was finished for {now - self._stepped:.0f} s" if now - self._stepped > patience else ""
        quietest = min(range(self._config.ranks), key=self._heard.__getitem__)
        silent = now - self._heard[quietest]
        if silent > (patience if busy else PING_DEADLINE):
            return f"{self.who(quietest)} has not answered for {silent:.0f} s"
        return ""

    def quiet(self) -> float:
        """Seconds since the rank was heard that has said nothing for longest."""
        return time.monotonic() - min(self._heard)

    def every(self) -> float:
        """Seconds between two rounds of `silent`."""
        return min(PING_EVERY, self._config.step_deadline / 4)

    def rest(self) -> None:
        """A round in which nobody is expected to say anything."""
        self._n_silent = [0] * self._config.ranks

    def silent(self, rank: int, busy: bool) -> float:
        """Once in a round: for how many seconds nothing came from a rank that has been silent for too long; else 0.

        What counts are our own rounds in which nothing came, not the clock: after this process itself was paused, the
        worker's answers lie unread and nobody is to blame.
        """
        self._n_silent[rank] = self._n_silent[rank] + 1 if self._n_heard[rank] == self._n_heard_before[rank] else 0
        self._n_heard_before[rank] = self._n_heard[rank]
        seconds = self._n_silent[rank] * self.every()
        if seconds <= self._limit(busy):
            return 0.0
        self._n_silent[rank] = 0
        return seconds

    def _limit(self, busy: bool) -> float:
        """Seconds that a rank may say nothing. An idle rank has nothing that would keep it from answering, and the
        others will want it in the next step; a busy one is watched by the others."""
        if self._config.ranks == 1 or busy:
            return self._config.step_deadline
        return min(self._config.step_deadline, max(self._config.rank_deadline, 2 * PING_EVERY))

    def who(self, rank: int) -> str:
        return "the worker" if self._config.ranks == 1 else f"rank {rank}"
