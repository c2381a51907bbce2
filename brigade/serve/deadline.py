"""Ends Python code that runs too long, a template's endless loop for instance. Knows nothing of what it ends."""

import sys
import time
from types import FrameType, TracebackType
from typing import Any


class TooSlow(ValueError):
    """The code ran longer than it may."""


class Deadline:
    """A context in which this thread's Python code raises TooSlow once `seconds` have passed.

    Every line of Python is looked at, so loops end; a single call into C is not interrupted.
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
