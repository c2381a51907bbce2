"""What the units of a fleet may be told to do, and when one should do something else. Pure: no clock, no messages.

Prompts are computed on one side and continued on the other; a mixed unit is on both. A unit that is to change its role
takes new work only for what the old role and the new one have in common, until what it has of the rest is done. One
that is drained takes none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from brigade.spec.layout import Role

Side = Literal["prefill", "decode"]
SIDES: dict[Role, frozenset[Side]] = {
    "mixed": frozenset[Side](("prefill", "decode")),
    "prefill": frozenset[Side](("prefill",)),
    "decode": frozenset[Side](("decode",)),
}
DOES: dict[Side, str] = {"prefill": "computes prompts", "decode": "decodes"}


@dataclass(frozen=True, slots=True)
class Duty:
    """One unit: what it does and is to do."""

    name: str
    role: Role
    next_role: Role
    """Another one than `role` while it changes."""
    drained: bool = False
    """It is to take no new work."""
    up: bool = True
    n_requests: int = 0
    """That it has something of."""

    @property
    def sides(self) -> frozenset[Side]:
        """For what it takes new work."""
        return frozenset() if self.drained else SIDES[self.role] & SIDES[self.next_role]


@dataclass(frozen=True, slots=True)
class UnitState:
    """What is told of a unit."""

    name: str
    role: Role
    next_role: Role
    """Another one than `role` while the unit finishes what only the old one does."""
    state: str
    """serving, changing, draining, drained, restarting, or not ready."""
    reason: str
    """Why it is not ready; empty if it is."""
    ranks: int
    prefill: int
    """Requests whose prompts it computes for others."""
    decode: int
    """Requests that it decodes, or will."""


def last_of(units: Sequence[Duty], name: str, without: frozenset[Side]) -> str:
    """Why the unit called `name` cannot stop to be on the sides `without`: nobody else is on one of them and up; empty
    if it can."""
    others = [u for u in units if u.name != name]
    for side in sorted(without, reverse=True):
        if any(side in u.sides and u.up for u in others):
            continue
        down = [u.name for u in others if side in u.sides]
        but = f"; {', '.join(down)} would, but {'is' if len(down) == 1 else 'are'} not up" if down else ""
        return f"{name} is the last unit that {DOES[side]}{but}"
    return ""


@dataclass(frozen=True, slots=True)
class Targets:
    """How long requests should wait for each side, and how patient changes are. Raises ValueError, naming the field."""

    prefill_seconds: float = 2.0
    """From the moment that a decode rank has room for a prompt until a prefill rank begins to compute it."""
    decode_seconds: float = 0.5
    """Until a decode rank has room."""
    slack: float = 0.5
    """A side can spare a unit while its wait is below this share of its target."""
    looks: int = 3
    """So many looks one after another must say the same before a unit changes."""
    rest: int = 6
    """Looks after a change in which nothing changes again: its effect must show first."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("prefill_seconds", 0.01, 3600),
            ("decode_seconds", 0.01, 3600),
            ("slack", 0.0, 1.0),
            ("looks", 1, 1000),
            ("rest", 0, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Change:
    """A unit that should do something else."""

    name: str
    role: Side
    why: str


@dataclass(slots=True)
class Policy:
    """Moves units between prefill and decode by how long requests wait for each. Mixed ones are left alone.

    1. A side is short while requests wait longer for it than its target, and the other one, which could lend a unit, is
       well below its own. Where both are short, nothing that moves would help.
    2. If that is so in `looks` looks one after another, the least busy unit of the other side changes, if one is left
       there.
    3. Then nothing changes for `rest` looks, nor while a unit is still changing.
    """

    targets: Targets
    _said: list[Side | None] = field(default_factory=list)
    _rests: int = 0

    def look(self, waits: Mapping[Side, float], units: Sequence[Duty]) -> Change | None:
        """Once in a while: what should change now. `waits`: seconds that requests wait for each side."""
        short = self._short(waits)
        self._said = [*self._said, short][-self.targets.looks :]
        if self._rests:
            self._rests -= 1
            return None
        if short is None or self._said != [short] * self.targets.looks or any(u.role != u.next_role for u in units):
            return None
        other: Side = "decode" if short == "prefill" else "prefill"
        able = [u for u in units if u.role == other and u.up and not u.drained]
        able = [u for u in able if not last_of(units, u.name, SIDES[other])]
        if not able:
            return None
        self._said, self._rests = [], self.targets.rest
        chosen = min(able, key=lambda u: u.n_requests)
        return Change(
            chosen.name, short, f"requests wait {waits[short]:.2f} s for {short}, {waits[other]:.2f} s for {other}"
        )

    def _short(self, waits: Mapping[Side, float]) -> Side | None:
        """The side that should have another unit."""
        target: dict[Side, float] = {"prefill": self.targets.prefill_seconds, "decode": self.targets.decode_seconds}
        pressure = {side: waits[side] / target[side] for side in target}
        more, less = sorted(target, key=pressure.__getitem__, reverse=True)
        return more if pressure[more] > 1 and pressure[less] < self.targets.slack else None
