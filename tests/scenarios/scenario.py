"""Load, fault, recover, check: what is done to a fleet, as data, and the one function that does it.

1. load: some requests run, and one more, the watched one, is brought to a state of its hand-over. The ranks that could
   take it further are stopped, so a fault meets it exactly there.
2. fault: functions from `faults`.
3. recover: what is still stopped goes on. Everybody has the text of one rank, or an error, by a deadline.
4. check: all of `checks`, after every scenario.
"""

import asyncio
import contextlib
import os
import re
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from brigade.core.handover import Deadlines, Event, State
from brigade.core.roles import Side
from brigade.engine.fleet import Fleet
from brigade.engine.generation import Generation
from tests.engine.asking import until
from tests.scenarios import checks, fleets
from tests.scenarios.link import Link
from tests.scenarios.one_rank import LONG, MANY, PROMPTS, says

ANSWERED = 30.0
"""Seconds after the fault by which every client has its answer or an error."""

WATCHED, OTHERS = MANY, PROMPTS[6:10]
"""Prompts of 800 tokens, and of 9 to 153."""

SAME_TEXT = "the text of one rank"
LEFT = "nothing: the client has left"


@dataclass
class Scene:
    """A scenario while it runs."""

    fleet: Fleet
    link: Link | None
    watched: Generation = field(init=False)
    stopped: set[int] = field(default_factory=set)
    """Processes that stand still so that the watched request stays where it is."""

    def pids(self, side: Side) -> list[int]:
        return fleets.pids(self.fleet, side)

    def pid(self, side: Side) -> int:
        """The rank that has the watched request; without one any rank of that side."""
        return fleets.pid_of(self.fleet, self.watched, side) or self.pids(side)[0]

    def stop(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self.stopped.add(pid)

    def go_on(self, *pids: int) -> None:
        for pid in pids:
            self.stopped.discard(pid)
            with contextlib.suppress(ProcessLookupError):  # it was killed
                os.kill(pid, signal.SIGCONT)

    async def bring_to(self, state: State) -> None:
        """Submit the watched request and hold it in this state."""
        prefill, decode = self.pids("prefill"), self.pids("decode")
        self.stop(*{State.ROUTED: decode, State.PREFILLING: prefill, State.ADOPTING: prefill}.get(state, []))
        self.watched = await self.fleet.submit(WATCHED, LONG, salt=secrets.token_hex(4))  # so that no page is known
        if state is State.TRANSFERRING:
            fleets.when(self.fleet, self.watched, Event.OFFERED, lambda: self.stop(*prefill))
        if state is State.ADOPTING:
            await self._reaches(State.PREFILLING)
            self.stop(*decode)
            self.go_on(*prefill)
        await self._reaches(state)
        if state is State.DECODING:
            self.stop(*decode)

    async def _reaches(self, state: State) -> None:
        assert await until(lambda: fleets.state_of(self.fleet, self.watched) is state, 10), self.fleet.states()


Fault = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """`answer`: of the watched request: SAME_TEXT, LEFT, or what an error says (a pattern). Others get their text."""

    name: str
    at: State
    faults: tuple[Fault, ...]
    answer: str = SAME_TEXT
    transfers: str = ""
    """How all prompts reached their decode ranks: "fetched", or "computed" there; empty: either way."""
    log: str = ""
    """What the log names (a pattern): the culprit."""
    others: int = 4
    """Requests that run beside the watched one."""
    deadlines: Deadlines | None = None
    """Other than the fleet's own."""


async def play(scenario: Scenario, fleet: Fleet, link: Link | None, log: Callable[[], str]) -> None:
    """Raises AssertionError for what does not hold."""
    assert await until(lambda: fleets.all_up(fleet), checks.RECOVERED), "what was before has left ranks that are lost"
    before, deadlines = checks.Before(fleet, link), fleet.deadlines
    fleet.deadlines = scenario.deadlines or deadlines
    scene = Scene(fleet, link)
    others = [asyncio.create_task(fleets.said(await fleet.submit(p, LONG))) for p in OTHERS[: scenario.others]]
    try:
        await scene.bring_to(scenario.at)
        watched = asyncio.create_task(fleets.said(scene.watched))
        for fault in scenario.faults:
            await fault(scene)
        scene.go_on(*scene.stopped)
        got = await asyncio.wait_for(asyncio.gather(watched, *others), ANSWERED)
    finally:
        scene.go_on(*scene.stopped)
        fleet.deadlines = deadlines
        if link:
            link.heal()
    assert got[1:] == [says(p) for p in OTHERS[: scenario.others]]
    if scenario.answer == SAME_TEXT:
        assert got[0] == says(WATCHED)
    elif scenario.answer != LEFT:
        assert re.search(scenario.answer, str(got[0])), got[0]
    assert not scenario.transfers or before.new_transfers(fleet) == {scenario.transfers}
    await checks.nothing_is_left(fleet, before)
    assert re.search(scenario.log, log(), re.DOTALL), log()
