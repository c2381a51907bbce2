"""How long the parts of some work take: spans one after another, kept only while somebody records. Pure: the clock is
given.

A part ends where the next one begins, so one call at each border is enough, and there is nothing to close when a part
raises. While nobody records, that call looks at one flag.
"""

from collections import deque
from collections.abc import Callable

MOST = 1 << 16
"""Spans that are kept: about four seconds of a model of 61 layers at 30 steps a second."""

Lap = tuple[str, int, int, int, int]
"""Name, begin and end in nanoseconds, layer (-1: none), lane."""


class Laps:
    """Of one thread, which calls `begin` and `end`; `record` and `take` may be called from another one, between two of
    its parts."""

    __slots__ = ("_clock", "_laps", "_last", "_n", "on")

    def __init__(self, clock: Callable[[], int]) -> None:
        """`clock`: nanoseconds."""
        self.on = False
        self._clock, self._laps = clock, deque[Lap]()
        self._last = self._n = 0

    def record(self, most: int = MOST) -> None:
        """Forget what there is and keep spans from now on, the newest ones if there are more than `most`."""
        self._laps = deque(maxlen=most)
        self._n, self._last = 0, self._clock()
        self.on = True

    def begin(self) -> None:
        """What was before is no part of anything."""
        if self.on:
            self._last = self._clock()

    def end(self, name: str, layer: int = -1, lane: int = 0) -> None:
        """A part ends here, and the next one begins."""
        if not self.on:
            return
        now = self._clock()
        self._laps.append((name, self._last, now, layer, lane))
        self._last, self._n = now, self._n + 1

    def note(self, name: str, begin: int, end: int, layer: int = -1) -> None:
        """Something that was measured elsewhere, and may overlap with all else."""
        if self.on:
            self._laps.append((name, begin, end, layer, 0))
            self._n += 1

    def take(self) -> tuple[list[Lap], int]:
        """Stop. The spans, oldest first, and how many more there were before them."""
        self.on = False
        laps, n = list(self._laps), self._n
        self._laps.clear()
        self._n = 0
        return laps, n - len(laps)
