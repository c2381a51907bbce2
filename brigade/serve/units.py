"""GET /debug/units: what operators see of units and of recent requests. Reads what the engine knows, asks nobody."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brigade.spec.layout import Role

if TYPE_CHECKING:
    from brigade.engine.crew import Member
    from brigade.engine.fleet import Fleet

RECENT_SECONDS, MOST_RECENT = 60.0, 1024
"""How old values may be, and how many are kept, for percentiles of now."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the requests of the last minute; seconds, None where there were none."""

    n: int
    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank after its last step or ping."""

    rank: int
    running: int
    waiting: int
    kv_pages: int
    kv_pages_used: int
    kv_pages_reserved: int
    """Of those used: being filled from elsewhere."""
    kv_pages_offered: int
    """Of those used: computed prompts that others may fetch; a page that two prompts share counts twice."""
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class UnitReport:
    name: str
    role: Role
    next_role: Role
    """Another one than `role` while the unit finishes what only the old one does."""
    state: str
    """serving, changing, draining, drained, restarting, or not ready."""
    reason: str
    """Why it is not ready; empty if it is."""
    restarts: int
    """Times that a process of it was replaced."""
    ranks: list[RankReport]


@dataclass(frozen=True, slots=True)
class HandOvers:
    """Of all units together."""

    states: dict[str, int]
    """Requests by where they are on their way."""
    fetched: int
    """Prompts that went to a decode rank, so far."""
    computed: int
    """Those that it computed itself because they could not be fetched."""
    seconds: float
    """All transfers together."""


@dataclass(frozen=True, slots=True)
class ServerReport:
    model: str
    version: str
    uptime: float
    """Seconds since it began to answer."""
    ready: bool
    reason: str
    ttft: Percentiles
    tpot: Percentiles
    prompt_tokens: int
    cached_prompt_tokens: int
    """Of the prompts', those found in a prefix cache."""
    generation_tokens: int
    finished: dict[str, int]
    """Requests by why they ended."""
    units: list[UnitReport]
    handovers: HandOvers


class Recent:
    """Values of the last minute, at most so many."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=MOST_RECENT)

    def add(self, value: float) -> None:
        self._values.append((time.monotonic(), value))

    def percentiles(self) -> Percentiles:
        since = time.monotonic() - RECENT_SECONDS
        values = sorted(value for at, value in self._values if at >= since)
        return Percentiles(len(values), _at(values, 0.5), _at(values, 0.99))


def _at(values: Sequence[float], share: float) -> float | None:
    """The smallest of sorted values that this share of them does not exceed."""
    return values[min(int(share * len(values)), len(values) - 1)] if values else None


def unit_reports(engine: "Fleet") -> list[UnitReport]:
    """All units as they are now."""
    return [_unit_report(member) for member in engine.crew.members]


def _unit_report(member: "Member") -> UnitReport:
    unit, told = member.engine, member.told
    pages = unit.ready.n_pages // unit.config.ranks
    ranks = [
        RankReport(
            rank=rank,
            running=s.running,
            waiting=s.waiting,
            kv_pages=pages,
            kv_pages_used=s.pages_used,
            kv_pages_reserved=s.pages_reserved,
            kv_pages_offered=s.pages_offered,
            steps=s.n_steps,
            preemptions=s.n_preempted,
        )
        for rank, s in enumerate(unit.rank_stats())
    ]
    return UnitReport(told.name, told.role, told.next_role, told.state, told.reason, unit.n_restarts, ranks)


def handovers(engine: "Fleet") -> HandOvers:
    """Of all units together."""
    states, transfers, seconds = engine.handovers()
    return HandOvers(states, transfers["fetched"], transfers["computed"], seconds)
