"""The units of a fleet: which of their ranks a request gets, and how a unit stops, starts again and changes its role.

A unit that is drained, or is to change its role, finishes what it has; `brigade.core.roles` says what it takes
meanwhile. It is empty, or has changed, when the last part of a request that it should not have any more has left.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from brigade.core.handover import State
from brigade.core.roles import SIDES, Duty, Side, UnitState, last_of
from brigade.engine.client import Engine
from brigade.engine.flight import RequestPart
from brigade.engine.output import NotAllowed, UnknownUnit
from brigade.engine.router import Room, Router
from brigade.spec.layout import Role

if TYPE_CHECKING:
    from brigade.engine.flight import Flight

log = logging.getLogger("brigade.fleet")

QUIET = 2.0
"""Seconds. A unit with a rank that has said nothing for longer gets no new requests while there are others: it may be
in a long step, or stand still, which is certain only at its step deadline."""
FORCE = "; with force, its requests wait, and fail when none has come in time"


@dataclass(eq=False)
class Member:
    """One unit."""

    name: str
    engine: Engine
    role: Role
    next_role: Role
    drained: bool = False
    restarts: bool = False
    """It is to be started again once it is empty, and takes work after that."""
    parts: dict[int, RequestPart] = field(default_factory=dict)

    @property
    def duty(self) -> Duty:
        return Duty(self.name, self.role, self.next_role, self.drained, self.engine.up, len(self.parts))

    def n(self, side: Side) -> int:
        return sum(part.side == side for part in self.parts.values())

    @property
    def holds_room(self) -> bool:
        """Whether it keeps pages for prompts that are still to be computed somewhere: it was a decode unit."""
        waiting = (State.ROUTED, State.PREFILLING)
        return any(p.side == "decode" and not p.whole and p.flight.state in waiting for p in self.parts.values())

    @property
    def told(self) -> UnitState:
        health, ranks = self.engine.health(), self.engine.config.ranks
        why, state = "" if health.ready else health.reason, self._state(health.ready)
        n_prefill, n_decode = self.n("prefill"), self.n("decode")
        return UnitState(self.name, self.role, self.next_role, state, why, ranks, n_prefill, n_decode)

    def _state(self, ready: bool) -> str:
        if self.drained:
            return "draining" if self.parts else "restarting" if self.restarts else "drained"
        if not ready:
            return "not ready"
        return "serving" if self.role == self.next_role else "changing"


class Crew:
    """All units of a fleet. Use it from one event loop."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._at = [(m, rank) for m in members for rank in range(m.engine.config.ranks)]
        rooms = [
            Room(m.engine.config.max_running, m.engine.ready.n_pages // m.engine.config.ranks) for m, _ in self._at
        ]
        first = members[0].engine
        self._router = Router(first.spec, first.ready.page, rooms)
        self._restarting: set[asyncio.Task[None]] = set()

    # Requests

    def choose(self, flight: "Flight", side: Side, rid: int, max_new: int) -> RequestPart | None:
        """A rank for a part of a request; None while no unit of that side is there."""
        among = self._able(side)
        if not among:
            return None
        at = self._router.place(rid, flight.tokens, max_new, flight.salt, among)
        member, rank = self._at[at]
        whole = side == "decode" and among[at] == "mixed"
        part = member.parts[rid] = RequestPart(flight, side, rid, member, rank, whole)
        return part

    @property
    def there(self) -> set[Side]:
        """Sides that a rank can be had for now."""
        return {side for duty in self._duties() if duty.up for side in duty.sides}

    def got_token(self, part: RequestPart) -> None:
        self._router.got_token(part.rid)

    def left(self, part: RequestPart) -> None:
        """This part is over."""
        self._router.ended(part.rid)
        if part.unit.parts.pop(part.rid, None) is not None:
            self._settle(part.unit)

    def lost(self, part: RequestPart) -> None:
        """The rank of this part has lost its cache, or may have: it counts as having no prompt's beginning."""
        self._router.lost(self._at.index((part.unit, part.rank)))

    def problem(self) -> str:
        """Why requests cannot be served now; empty if they can: there is a unit that is well for each side."""
        for side in sorted(SIDES["mixed"]):
            members = [m for m in self.members if side in m.duty.sides]
            told = [m.engine.health() for m in members]
            if any(health.ready for health in told):
                continue
            if len(self.members) == 1 and told:
                return told[0].reason
            whys = [f"{m.name}: {health.reason}" for m, health in zip(members, told, strict=True)]
            return f"no {side} unit: {'; '.join(whys) or 'none takes work'}"
        return ""

    @property
    def most(self) -> int:
        """Requests that may run and wait, all together. Units that are lost or drained count: they come back."""
        configs = [m.engine.config for m in self.members if "decode" in SIDES[m.role] | SIDES[m.next_role]]
        return sum(c.ranks * c.max_running + c.max_waiting for c in configs)

    # Orders

    def find(self, name: str) -> Member:
        """Raises UnknownUnit."""
        for member in self.members:
            if member.name == name:
                return member
        raise UnknownUnit(f"there is no unit {name[:100]!r}; there are {', '.join(m.name for m in self.members)}")

    def drain(self, name: str, force: bool = False, restart: bool = False) -> UnitState:
        """Give a unit no new work; `restart`: start it again once it is empty, and then give it work.

        Twice is harmless. Raises UnknownUnit, and NotAllowed for the last unit of a side, unless `force`.
        """
        member = self.find(name)
        if not member.drained:
            duty = member.duty
            if not force and (why := last_of(self._duties(), name, duty.sides)):
                raise NotAllowed(why + FORCE)
            log.warning("%s takes no new work; it has %d requests left", name, len(member.parts))
        member.drained = True
        member.restarts |= restart
        self._settle(member)
        return member.told

    def undrain(self, name: str) -> UnitState:
        """Give a unit work again. Harmless for one that takes work. Raises UnknownUnit, and NotAllowed for one that is
        being started again: it takes work after that."""
        member = self.find(name)
        if member.drained and member.restarts and not member.parts:
            raise NotAllowed(f"{name} is being started again; it takes work when it is up")
        if member.drained:
            log.warning("%s takes work again", name)
        member.drained = member.restarts = False
        return member.told

    def set_role(self, name: str, role: Role, force: bool = False) -> UnitState:
        """Have a unit do something else once it has finished what only its role now does. Harmless for its own role.

        Raises UnknownUnit, and NotAllowed for a unit that is alone, and for the last one of a side, unless `force`.
        """
        member = self.find(name)
        if len(self.members) == 1 and role != "mixed":
            raise NotAllowed(f"{name} is the only unit: it computes prompts and decodes")
        duty = member.duty
        if not force and (why := last_of(self._duties(), name, duty.sides - SIDES[role])):
            raise NotAllowed(why + FORCE)
        if role != member.next_role:
            log.warning("%s is %s and becomes %s", name, member.role, role)
        member.next_role = role
        self._settle(member)
        return member.told

    async def close(self) -> None:
        for task in self._restarting:
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)

    def _duties(self) -> list[Duty]:
        return [m.duty for m in self.members]

    def _able(self, side: Side) -> dict[int, Role]:
        """Ranks that can be had for a side now, and what they do: those of units that are well, if there are any; of
        these, those that were heard just now."""
        doing = {m: m.duty for m in self.members}
        there = {m for m, duty in doing.items() if side in duty.sides and duty.up}
        there = {m for m in there if m.engine.health().ready} or there
        there = {m for m in there if m.engine.quiet < QUIET} or there
        if side == "prefill":  # prompts that wait for room which is kept for such prompts could wait for ever
            there = {m for m in there if not m.holds_room} or there
        return {i: _role_of(doing[m]) for i, (m, _) in enumerate(self._at) if m in there}

    def _settle(self, member: Member) -> None:
        """See whether a unit has finished what it should not have any more."""
        if member.role != member.next_role and not any(
            member.n(s) for s in SIDES[member.role] - SIDES[member.next_role]
        ):
            log.warning("%s was %s and is %s now", member.name, member.role, member.next_role)
            member.role = member.next_role
        if member.drained and member.restarts and not member.parts and not self._is_restarting(member):
            task = asyncio.create_task(self._restart(member), name=member.name)
            self._restarting.add(task)
            task.add_done_callback(self._restarting.discard)

    def _is_restarting(self, member: Member) -> bool:
        return any(task.get_name() == member.name for task in self._restarting)

    async def _restart(self, member: Member) -> None:
        log.warning("%s is empty and is started again", member.name)
        await member.engine.restart()
        log.warning("%s is up again and takes work", member.name)
        member.drained = member.restarts = False


def _role_of(duty: Duty) -> Role:
    """What a unit does for new requests."""
    return "mixed" if len(duty.sides) == 2 else next(iter(duty.sides))
