"""Has the ranks of a unit record what they compute, and collects it. Sends and hears; writes no trace.

Clocks: processes of one host read the same CLOCK_MONOTONIC. For the others the offset is taken from the ping with the
shortest way there and back, as NTP does: it is wrong by at most half of that time, and where it is smaller than this,
the clocks count as the same.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from brigade.core.laps import Lap
from brigade.engine.messages import Ping, Pong, Ran, Record, Spans, TellSpans, ToWorker

ANSWER_DEADLINE = 15.0
"""Seconds until a rank must have told its spans: it does so between two steps."""
CLOCK_EVERY = 0.1
"""Seconds between two looks at the clocks of ranks."""
FIRST_CLOCK = 1 << 48
"""Numbers of pings from here on are about clocks."""


@dataclass(slots=True)
class RankSpans:
    """What one rank has told."""

    rank: int
    steps: list[Ran] = field(default_factory=list)
    parts: list[Lap] = field(default_factory=list)
    turns: list[Lap] = field(default_factory=list)
    n_lost: int = 0
    """Spans that there was no room for, before those here."""
    offset: int = 0
    """Nanoseconds that the clock of its host is ahead of ours."""
    uncertain: int = 0
    """By how much the offset may be wrong."""
    problem: str = ""
    """Why it is missing, or some of it."""


class Recorder:
    """Of one unit. Use it from one event loop, for one recording at a time."""

    def __init__(self, n_ranks: int, send: Callable[[int, ToWorker], bool]) -> None:
        """`send`: to a rank; False where its unit is not whole."""
        self._n_ranks, self._send = n_ranks, send
        self._seqs, self._pings = itertools.count(1), itertools.count(FIRST_CLOCK)
        self._seq = 0
        self._asked: dict[int, int] = {}
        """Number of a ping -> when it was sent."""
        self._clocks: dict[int, tuple[int, int]] = {}
        """Rank -> the shortest way there and back, and the offset that it gave."""
        self._told: dict[int, RankSpans] = {}
        self._missing: set[int] = set()
        self._all_told = asyncio.Event()

    def start(self, seconds: float, most: int) -> None:
        """Have all ranks record, for so long at most, and so many spans of each kind."""
        self._clocks.clear()
        for rank in range(self._n_ranks):
            self._send(rank, Record(seconds, most))

    def ask_clocks(self) -> None:
        """Every CLOCK_EVERY seconds while recording."""
        for rank in range(self._n_ranks):
            number = next(self._pings)
            self._asked[number] = time.monotonic_ns()
            self._send(rank, Ping(number))

    def hear(self, rank: int, message: Spans | Pong) -> None:
        """Messages of a recording before, and pongs that others asked for, are nothing."""
        if isinstance(message, Pong):
            self._hear_clock(rank, message)
        elif message.seq == self._seq and (told := self._told.get(rank)):
            told.steps += message.steps
            told.parts += message.parts
            told.turns += message.turns
            told.n_lost += message.n_lost
            if message.last:
                self._missing.discard(rank)
                if not self._missing:
                    self._all_told.set()

    async def collect(self) -> list[RankSpans]:
        """Have all ranks stop and tell. Ranks that do not in time are there with their problem."""
        self._seq = next(self._seqs)
        self._told = {rank: RankSpans(rank) for rank in range(self._n_ranks)}
        self._missing = set(self._told)
        self._all_told.clear()
        for rank, told_by in self._told.items():
            if not self._send(rank, TellSpans(self._seq)):
                told_by.problem = "its unit was not whole when it was to tell its spans"
                self._missing.discard(rank)
        try:
            if self._missing:
                await asyncio.wait_for(self._all_told.wait(), ANSWER_DEADLINE)
        except TimeoutError:
            for rank in self._missing:
                self._told[rank].problem = f"it has not told its spans within {ANSWER_DEADLINE:g} s"
        told, self._told, self._seq = list(self._told.values()), {}, 0
        for one in told:
            way, offset = self._clocks.get(one.rank, (0, 0))
            one.uncertain = way // 2
            one.offset = offset if abs(offset) > one.uncertain else 0
        self._asked.clear()
        return told

    def stop(self) -> None:
        """Nobody wants it any more: what is told is for nobody."""
        self._seq = 0
        for rank in range(self._n_ranks):
            self._send(rank, TellSpans(0))

    def _hear_clock(self, rank: int, pong: Pong) -> None:
        if (sent := self._asked.pop(pong.seq, None)) is None:
            return
        now = time.monotonic_ns()
        way = now - sent
        if rank not in self._clocks or way < self._clocks[rank][0]:
            self._clocks[rank] = way, pong.clock - (sent + now) // 2
