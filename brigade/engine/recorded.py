"""What a rank records of its steps while it is told to, and tells in portions. Decides nothing."""

import time
from collections import deque
from collections.abc import Iterator

from brigade.core.laps import Laps
from brigade.core.scheduler import StepPlan
from brigade.engine.messages import Ran, Spans

PORTION = 4096
"""Spans of one message."""


class Recorded:
    """`parts`: of the thread that runs steps; `turns`: of the loop, which calls all methods but `ran`."""

    def __init__(self, parts: Laps) -> None:
        self.parts, self.turns = parts, Laps(time.monotonic_ns)
        self._steps: deque[Ran] = deque()
        self._until = 0.0

    @property
    def on(self) -> bool:
        return self.turns.on

    def record(self, seconds: float, most: int) -> None:
        """From now on, for so long at most, and so many spans of each kind."""
        self._steps = deque(maxlen=most)
        self.parts.record(most)
        self.turns.record(most)
        self._until = time.monotonic() + seconds

    def turn(self) -> None:
        """The loop comes round: a part of it begins, or the time is over."""
        if not self.on:
            return
        self.turns.begin()
        if time.monotonic() > self._until:
            self.parts.on = self.turns.on = False

    def ran(self, begin: float, plan: StepPlan, micro_batches: int) -> None:
        """A step has ended that began at this time of the monotonic clock, in seconds."""
        if self.on:
            slices = [(s.rid, s.start, len(s.tokens)) for s in plan.slices]
            self._steps.append(Ran(int(1e9 * begin), time.monotonic_ns(), micro_batches, slices))

    def tell(self, seq: int) -> Iterator[Spans]:
        """Stop and give everything."""
        (parts, n_lost), (turns, n_more) = self.parts.take(), self.turns.take()
        steps = list(self._steps)
        self._steps.clear()
        for i in range(0, max(len(parts), len(turns), len(steps)), PORTION):
            here = slice(i, i + PORTION)
            yield Spans(seq, steps[here], parts[here], turns[here])
        yield Spans(seq, [], [], [], n_lost + n_more, last=True)
