"""Who kept the cores busy? What a measurement used itself, and what disturbed it. Must not know what is measured."""

import os
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Usage:
    """Cores that were busy, on average, over one stretch of time."""

    seconds: float
    own_cores: float
    """With this process and everything that it started."""
    other_cores: float
    """With everything else, time that a hypervisor gave to other guests among it."""
    load_average: float
    """Over the minute before the stretch."""


class Watch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._own, self._busy, self._start = _own_seconds(), _busy_seconds(), time.monotonic()

    def usage(self) -> Usage:
        """Of the time since it was made."""
        seconds = time.monotonic() - self._start
        own = _own_seconds() - self._own
        other = max(_busy_seconds() - self._busy - own, 0.0)  # the two clocks tick apart by a few milliseconds
        return Usage(seconds, own / seconds, other / seconds, self._load)


def wait_for_quiet(busy_cores: float, seconds: float) -> bool:
    """Wait until less than `busy_cores` were busy for two seconds, at most `seconds`; whether it came to that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before, start = _busy_seconds(), time.monotonic()
        time.sleep(2.0)
        if (_busy_seconds() - before) / (time.monotonic() - start) < busy_cores:
            return True
    return False


def _own_seconds() -> float:
    """CPU time of this process, of all below it, and of those that have ended."""
    own = psutil.Process()
    return sum(_cpu_seconds(p) for p in (own, *own.children(recursive=True)))


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        t = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(t.user + t.system + t.children_user + t.children_system)


def _busy_seconds() -> float:
    """CPU time of the whole machine that was not idle."""
    t = psutil.cpu_times()
    return float(t.user + t.nice + t.system + t.irq + t.softirq + t.steal)
