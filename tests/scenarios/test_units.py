"""Ranks of a fleet are killed, stand still, and clients leave, in every state of a hand-over."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from brigade.core.handover import Deadlines, State
from brigade.engine.fleet import Fleet
from tests.scenarios.faults import (
    another_leaves,
    freeze,
    kill,
    kill_all,
    leave,
    newcomers_avoid,
    pause,
    wait_for_the_deadline,
)
from tests.scenarios.fleets import config, running, unit
from tests.scenarios.scenario import LEFT, Scenario, play

KILLED = "lost.*killed by SIGKILL"

WITHIN = Deadlines(routed=0.5, prefilling=0.5, transferring=0.5)

SCENARIOS = [
    *(
        Scenario(f"a client leaves while {at}", at, (leave,), LEFT)
        for at in (State.ROUTED, State.PREFILLING, State.TRANSFERRING, State.ADOPTING, State.DECODING)
    ),
    *(
        Scenario(
            f"no request is {at} for longer than the deadline",
            at,
            (wait_for_the_deadline,),
            answer=f"was {at} for longer than 0.5 s",
            others=0,
            deadlines=WITHIN,
        )
        for at in (State.ROUTED, State.PREFILLING, State.TRANSFERRING)
    ),
    Scenario("a prefill rank is killed while it computes", State.PREFILLING, (kill("prefill"),), log=KILLED),
    Scenario(
        # The next one computes the prompt, or the decode rank if it sees the broken link before the fleet sees the loss
        "a prefill rank is killed while its rows are fetched",
        State.TRANSFERRING,
        (kill("prefill"),),
        log=KILLED,
    ),
    *(
        Scenario(f"a decode rank is killed while {at}", at, (kill("decode"),), log=KILLED)
        for at in (State.ROUTED, State.TRANSFERRING, State.ADOPTING, State.DECODING)
    ),
    Scenario("everything is killed at once", State.DECODING, (kill_all, another_leaves), log=KILLED),
    Scenario("both sides stand still for a while", State.ADOPTING, (pause("prefill", 1), pause("decode", 0.2))),
    Scenario(
        "a decode rank stands still for ever",
        State.DECODING,
        (freeze("decode"), newcomers_avoid("decode")),
        log="nothing came from it for .* killing it",
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    names = "prefill-0", "prefill-1", "decode-0", "decode-1"
    async with running(config(*(unit(name, step_deadline=3, max_step_tokens=16) for name in names))) as fleet:
        yield fleet


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
async def test_units(scenario: Scenario, fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    await play(scenario, fleet, None, lambda: caplog.text)
