"""Ends Python code that runs too long, a template's endless loop for instance. Knows nothing of what it ends."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

RING_AGAIN = 0.005
"""Seconds after which an alarm rings again: something on the way may have swallowed the first exception."""


class TooSlow(ValueError):
    """The code ran longer than it may."""


class Deadline:
    """A context in which this thread's Python code raises TooSlow once `seconds` have passed.

    Every line of Python is looked at, so loops end; a single call into C is not interrupted. It makes code several
    times slower: see Alarm.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = 0.0

    def __enter__(self) -> None:
        self._end = time.monotonic() + self._seconds
        sys.settrace(self._look)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        sys.settrace(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._end:
            raise TooSlow(f"it took longer than {self._seconds:g} s")
        return self._look


class Alarm:
    """Gives work on the main thread so many seconds of the process's computing time. Costs two system calls.

    One for a process: it keeps SIGVTALRM, whose default would end the process if one came late.
    """

    def __init__(self) -> None:
        self._armed = False

    @property
    def here(self) -> bool:
        """Whether it can be used where this is asked: Python hears signals on its main thread only."""
        return threading.current_thread() is threading.main_thread()

    def within(self, seconds: float, work: Callable[[], T]) -> T:
        """The result of `work`. Raises TooSlow, from whatever line of Python it was at."""
        if signal.getsignal(signal.SIGVTALRM) != self._ring:
            signal.signal(signal.SIGVTALRM, self._ring)
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, RING_AGAIN)
            try:
                return work()
            finally:
                self._off()
        except TooSlow:
            self._off()  # it may have rung just before it was off
            raise

    def _off(self) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            raise TooSlow("it took too long")
