"""Changes roles of units by how long requests wait, if that is switched on. `brigade.core.roles` decides."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from statistics import fmean

from brigade.core.handover import State
from brigade.core.roles import Policy, Side, Targets
from brigade.engine.crew import Crew
from brigade.engine.flight import Flight
from brigade.engine.output import NotAllowed

log = logging.getLogger("brigade.fleet")

LOOK_EVERY = 5.0
"""Seconds between two looks."""
MOST = 4096
"""Waits that are remembered between two looks; where nobody looks, the last ones."""
_SIDE: dict[State, Side] = {State.ROUTED: "decode", State.PREFILLING: "prefill"}
"""What a request waits for in each of these states: room on a decode rank, or a prefill rank that begins with it."""


class Waits:
    """How long requests were in the states that they wait in, since the last look."""

    def __init__(self) -> None:
        self._over = _nothing()

    def left(self, state: State, seconds: float) -> None:
        """A request has left a state after so long."""
        if side := _SIDE.get(state):
            self._over[side].append(seconds)

    def look(self, flights: Iterable[Flight]) -> dict[Side, float]:
        """The mean wait for each side, of requests that have left and of those that still wait; then counting begins
        anew. 0 where nobody waited."""
        over, self._over = self._over, _nothing()
        now = time.monotonic()
        for flight in flights:
            if side := _SIDE.get(flight.state):
                over[side].append(now - flight.since)
        return {side: fmean(seconds) if seconds else 0.0 for side, seconds in over.items()}


def _nothing() -> dict[Side, deque[float]]:
    return {"prefill": deque(maxlen=MOST), "decode": deque(maxlen=MOST)}


async def shift(crew: Crew, waits: Waits, flights: Iterable[Flight], targets: Targets) -> None:
    """Look again and again, and give units other roles; until it is cancelled."""
    policy = Policy(targets)
    while True:
        await asyncio.sleep(LOOK_EVERY)
        change = policy.look(waits.look(flights), [member.duty for member in crew.members])
        if change is None:
            continue
        log.warning("%s is to be a %s unit: %s", change.name, change.role, change.why)
        try:
            crew.set_role(change.name, change.role)
        except NotAllowed as e:  # somebody has given other orders in between
            log.warning("%s stays as it is: %s", change.name, e)
