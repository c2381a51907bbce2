"""Units that are mixed, drained, started again and change their roles: text stays, pages come back, somebody serves."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from brigade.engine.crew import Member
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig
from brigade.engine.output import NotAllowed, Unavailable, UnknownUnit
from tests.engine.asking import until
from tests.scenarios.fleets import all_pages_are_back, ask_all, pids, running, said, unit
from tests.scenarios.one_rank import GREEDY, LONG, PROMPTS, says

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started() -> AsyncIterator[Fleet]:
    """A unit of each role, for tests that leave it as it was."""
    async with running(FleetConfig(units=(unit("prefill-0"), unit("decode-0"), unit("mixed-0")))) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(started: Fleet) -> AsyncIterator[Fleet]:
    assert await until(lambda: all(m.told.state == "serving" for m in started.crew.members), 20), tell(started)
    roles = {m.name: m.role for m in started.crew.members}
    yield started
    assert await all_pages_are_back(started)
    assert {m.name: m.role for m in started.crew.members} == roles


def tell(fleet: Fleet) -> dict[str, str]:
    return {m.name: m.told.state for m in fleet.crew.members}


def member(fleet: Fleet, name: str) -> Member:
    return fleet.crew.find(name)


async def started_at_once(fleet: Fleet, prompts: list[list[int]]) -> list[asyncio.Task[list[int]]]:
    """Answers to all of them, long ones, that have begun."""
    answers = [asyncio.create_task(said(await fleet.submit(p, LONG))) for p in prompts]
    assert await until(lambda: fleet.states()["decoding"] >= 3, 20)
    return answers


async def test_units_of_all_roles_share_the_work_and_say_the_same(fleet: Fleet) -> None:
    assert await ask_all(fleet, PROMPTS, GREEDY) == [says(p, GREEDY) for p in PROMPTS]
    answers = await started_at_once(fleet, PROMPTS)
    assert all(m.parts for m in fleet.crew.members if m.role != "prefill"), "both take requests"
    assert await asyncio.gather(*answers) == [says(p) for p in PROMPTS]
    assert fleet.transfers["fetched"]


async def test_a_mixed_unit_that_is_killed_leaves_its_requests_to_the_others(fleet: Fleet) -> None:
    answers = await started_at_once(fleet, PROMPTS)
    os.kill(pids(fleet, "mixed")[0], signal.SIGKILL)
    assert await asyncio.wait_for(asyncio.gather(*answers), 60) == [says(p) for p in PROMPTS]


async def test_prompts_are_computed_by_a_mixed_unit_while_the_prefill_unit_is_gone(fleet: Fleet) -> None:
    os.kill(pids(fleet, "prefill")[0], signal.SIGKILL)
    n = fleet.transfers["fetched"]
    assert await asyncio.wait_for(ask_all(fleet, PROMPTS, GREEDY), 60) == [says(p, GREEDY) for p in PROMPTS]
    assert fleet.transfers["fetched"] > n


# Draining ------------------------------------------------------------------------------------------------------------


async def test_a_drained_unit_finishes_what_it_has_and_gets_nothing_new(fleet: Fleet) -> None:
    answers = await started_at_once(fleet, PROMPTS)
    drained = member(fleet, "decode-0")
    assert drained.parts
    assert fleet.crew.drain("decode-0").state == "draining"
    assert fleet.crew.drain("decode-0").state == "draining", "twice"
    old = set(drained.parts)
    answers += await started_at_once(fleet, PROMPTS[:4])
    assert set(drained.parts) <= old
    assert await asyncio.gather(*answers) == [says(p) for p in PROMPTS + PROMPTS[:4]]
    assert drained.told.state == "drained"
    assert fleet.health().ready
    assert fleet.crew.undrain("decode-0").state == "serving"


async def test_a_drained_unit_is_started_again_and_takes_work(fleet: Fleet) -> None:
    before = set(pids(fleet, "decode"))
    answers = await started_at_once(fleet, PROMPTS)
    assert fleet.crew.drain("decode-0", restart=True).state in ("draining", "restarting")
    assert await asyncio.gather(*answers) == [says(p) for p in PROMPTS]
    assert await until(lambda: member(fleet, "decode-0").told.state == "restarting", 5)
    with pytest.raises(NotAllowed, match="decode-0 is being started again"):
        fleet.crew.undrain("decode-0")
    assert await ask_all(fleet, PROMPTS, GREEDY) == [says(p, GREEDY) for p in PROMPTS]
    assert await until(lambda: member(fleet, "decode-0").told.state == "serving", 20)
    assert not before & set(pids(fleet, "decode"))


async def test_a_unit_that_is_lost_while_it_is_drained_is_empty_and_stays_drained(fleet: Fleet) -> None:
    answers = await started_at_once(fleet, PROMPTS)
    fleet.crew.drain("decode-0")
    os.kill(pids(fleet, "decode")[0], signal.SIGKILL)
    assert await asyncio.wait_for(asyncio.gather(*answers), 60) == [says(p) for p in PROMPTS]
    assert await until(lambda: member(fleet, "decode-0").engine.up, 20)
    assert member(fleet, "decode-0").told.state == "drained"
    fleet.crew.undrain("decode-0")


async def test_the_last_unit_that_decodes_is_drained_only_by_force(fleet: Fleet) -> None:
    fleet.crew.drain("mixed-0")
    with pytest.raises(NotAllowed, match="decode-0 is the last unit that decodes; with force"):
        fleet.crew.drain("decode-0")
    assert fleet.crew.drain("decode-0", force=True).state == "drained"
    assert not fleet.health().ready
    assert "no decode unit" in fleet.health().reason
    answers = [asyncio.create_task(fleet.submit(PROMPTS[0], GREEDY, priority=p)) for p in (1, 0, -1, 0)]
    await asyncio.sleep(0.1)
    assert fleet.states()["queued"] == 4
    fleet.crew.undrain("decode-0")
    order: list[int] = []
    for i, answer in enumerate(answers):
        answer.add_done_callback(lambda _, i=i: order.append(i))  # type: ignore[misc]
    generations = await asyncio.wait_for(asyncio.gather(*answers), 10)
    assert order == [2, 1, 3, 0], "the most urgent one first, then as they came"
    assert len({tuple(await said(g)) for g in generations}) == 1
    fleet.crew.undrain("mixed-0")


async def test_a_unit_that_does_not_exist_is_told_with_those_that_do(fleet: Fleet) -> None:
    for order in (fleet.crew.drain, fleet.crew.undrain):
        with pytest.raises(UnknownUnit, match="no unit 'nobody'; there are prefill-0, decode-0, mixed-0"):
            order("nobody")


# Roles ---------------------------------------------------------------------------------------------------------------


async def test_a_unit_changes_its_role_when_it_has_finished_what_the_old_one_does(fleet: Fleet) -> None:
    answers = await started_at_once(fleet, PROMPTS)
    assert fleet.crew.set_role("decode-0", "prefill").state == "changing"
    assert member(fleet, "decode-0").role == "decode"
    assert await asyncio.gather(*answers) == [says(p) for p in PROMPTS]
    assert member(fleet, "decode-0").role == "prefill"
    with pytest.raises(NotAllowed, match="mixed-0 is the last unit that decodes"):
        fleet.crew.set_role("mixed-0", "prefill")
    fleet.crew.set_role("mixed-0", "decode")
    n = fleet.transfers["fetched"]
    assert await ask_all(fleet, PROMPTS, GREEDY) == [says(p, GREEDY) for p in PROMPTS]
    assert fleet.transfers["fetched"] == n + len(PROMPTS), "no unit does both now"
    fleet.crew.set_role("mixed-0", "mixed")
    fleet.crew.set_role("decode-0", "decode")


async def test_roles_that_change_all_the_time_change_no_text(fleet: Fleet) -> None:
    rng = random.Random(4)
    answers = [asyncio.create_task(ask_all(fleet, PROMPTS, LONG)) for _ in range(3)]
    while not all(a.done() for a in answers):
        name, role = rng.choice(("decode-0", "prefill-0", "mixed-0")), rng.choice(("prefill", "decode", "mixed"))
        try:
            fleet.crew.set_role(name, role)  # type: ignore[arg-type]
        except NotAllowed:
            continue
        finally:
            await asyncio.sleep(0.05)
    for answer in answers:
        assert await answer == [says(p) for p in PROMPTS]
    for name in ("mixed-0", "prefill-0", "decode-0"):
        fleet.crew.set_role(name, name.partition("-")[0], force=True)  # type: ignore[arg-type]


# One unit ------------------------------------------------------------------------------------------------------------


async def test_requests_of_a_unit_alone_go_on_when_a_rank_is_lost() -> None:
    async with running(FleetConfig.alone(unit("mixed-0", ranks=2).engine)) as fleet:
        answers = await started_at_once(fleet, PROMPTS)
        os.kill(pids(fleet, "mixed")[0], signal.SIGKILL)
        assert await asyncio.wait_for(asyncio.gather(*answers), 60) == [says(p) for p in PROMPTS]
        assert await all_pages_are_back(fleet)
        with pytest.raises(NotAllowed, match="mixed-0 is the only unit"):
            fleet.crew.set_role("mixed-0", "decode", force=True)
        fleet.crew.drain("mixed-0", force=True)
        waiting = asyncio.create_task(fleet.submit(PROMPTS[0], GREEDY))
        await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="the engine was closed"):
        await asyncio.wait_for(waiting, 1)
