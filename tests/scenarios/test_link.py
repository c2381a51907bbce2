"""A link over TCP that stalls, corrupts rows, delivers twice or breaks off costs time, never text."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from brigade.core.handover import Deadlines, State
from brigade.engine.fleet import Fleet
from tests.scenarios.faults import harm, kill
from tests.scenarios.fleets import config, running
from tests.scenarios.link import Harm, Link
from tests.scenarios.scenario import Scenario, play

AT = State.PREFILLING
SCENARIOS = [
    Scenario("rows are changed once", AT, (harm(Harm.CORRUPT, 1),), transfers="fetched", others=0),
    Scenario("rows are changed always", AT, (harm(Harm.CORRUPT, 99),), transfers="computed", others=0),
    Scenario("a piece comes twice", AT, (harm(Harm.TWICE, 1),), transfers="fetched", others=0),
    Scenario("it breaks off once", AT, (harm(Harm.CUT, 1),), transfers="fetched", others=0),
    Scenario("it breaks off always", AT, (harm(Harm.CUT, 99),), transfers="computed", others=0),
    Scenario("it stalls", AT, (harm(Harm.STALL, 1),), others=0, deadlines=Deadlines(adopting=2)),
    Scenario("its other end is killed, early", State.TRANSFERRING, (kill("prefill"),), transfers="fetched", others=0),
    Scenario("its other end is killed, late", State.ADOPTING, (kill("prefill"),), transfers="computed", others=0),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[Fleet]:
    async with running(config(link="tcp")) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def link(fleet: Fleet) -> AsyncIterator[Link]:
    link = Link(fleet)
    yield link
    await link.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
async def test_link(scenario: Scenario, fleet: Fleet, link: Link, caplog: pytest.LogCaptureFixture) -> None:
    await play(scenario, fleet, link, lambda: caplog.text)
