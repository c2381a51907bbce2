"""How long it takes until one of many requests ends, as far as the last ones tell. Pure: times are the caller's."""

from collections import deque
from dataclasses import dataclass, field

REMEMBERED = 64
"""Ends that count."""
UNKNOWN, SHORTEST, LONGEST = 5.0, 1.0, 120.0
"""Seconds that are told while too few requests have ended, and the bounds of what is told."""


@dataclass(slots=True)
class Pace:
    """Counts requests that ended and clients that were turned away, to say when one of these should come back.

    A place becomes free each time a request ends, and whoever was turned away before comes back for it first: so the
    n-th of them is told the time of n ends.
    """

    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _turned_away: int = 0

    def ended(self, now: float) -> None:
        self._ends.append(now)
        self._turned_away = max(self._turned_away - 1, 0)

    def turn_away(self, now: float) -> float:
        """Seconds after which this client should come back."""
        self._turned_away += 1
        if len(self._ends) < 2:
            return UNKNOWN
        each = (now - self._ends[0]) / len(self._ends)  # until now: if nothing ends any more, that shows
        return min(max(self._turned_away * each, SHORTEST), LONGEST)
