"""Prompts computed by one unit and continued by another say what one rank says, and nothing is left behind."""

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from brigade.comm.kv.nixl import installed
from brigade.core.handover import Deadlines
from brigade.core.roles import Side
from brigade.engine import fleet_start, handing
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.flight import Flight, RequestPart
from brigade.engine.keeper import Keeper
from brigade.engine.messages import Loading
from brigade.engine.output import LoadError, Unavailable, Unobserved
from tests.engine.asking import until
from tests.engine.conftest import workers
from tests.scenarios.fleets import all_pages_are_back, ask_all, config, pids, running, said, unit
from tests.scenarios.one_rank import ALL, DRAWN, GREEDY, LONG, says


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Fleet]:
    async with running(config()) as fleet:
        yield fleet


@pytest.mark.asyncio(loop_scope="module")
async def test_greedy_and_drawn_text_is_that_of_one_rank(pair: Fleet) -> None:
    fetched = pair.transfers["fetched"]
    for params in GREEDY, DRAWN:
        assert await ask_all(pair, ALL, params) == [says(p, params) for p in ALL]
    assert pair.transfers["fetched"] - fetched == 2 * len(ALL)
    assert not pair.transfers["computed"]
    assert await all_pages_are_back(pair)


@pytest.mark.asyncio(loop_scope="module")
async def test_one_token_and_stop_tokens_end_on_the_prefill_rank(pair: Fleet) -> None:
    want, n = says(ALL[0], GREEDY), pair.transfers["fetched"]
    assert await ask_all(pair, ALL[:1], replace(GREEDY, max_tokens=1)) == [want[:1]]
    assert await ask_all(pair, ALL[:1], replace(GREEDY, stop_token_ids=(want[0],))) == [want[:1]]
    assert pair.transfers["fetched"] == n
    assert await all_pages_are_back(pair)


class Told(Unobserved):
    """An Observer that keeps where requests were."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self.states: list[tuple[int, str]] = []

    def placed(self, rid: int, part: int) -> None:
        self.parts.append((rid, part))

    def moved(self, rid: int, state: str) -> None:
        self.states.append((rid, state))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_can_be_followed_over_both_ranks_and_the_link(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(pair, "_observer", told)
    for engine in (member.engine for member in pair.crew.members):
        engine.recorder.start(10, 9999)
    generation = await pair.submit(list(range(300, 500)), GREEDY)
    await said(generation)
    assert all(rid == generation.rid for rid, _ in told.parts)
    states = [state for rid, state in told.states if rid == generation.rid]
    assert states == ["queued", "routed", "prefilling", "transferring", "adopting", "decoding", "ended"]
    (prefill,), (decode,) = [await member.engine.recorder.collect() for member in pair.crew.members]
    taking, giving = (part for _, part in told.parts)
    assert giving in {rid for step in prefill.steps for rid, _, _ in step.slices}
    assert taking in {rid for step in decode.steps for rid, _, _ in step.slices}
    (transfer,) = [lap for lap in decode.turns if lap[0] == handing.TRANSFER_SPAN and lap[3] == taking]
    assert transfer[2] <= min(step.begin for step in decode.steps)


@pytest.mark.asyncio(loop_scope="module")
async def test_clients_that_leave_at_any_moment_leave_nothing_behind(pair: Fleet) -> None:
    rng = random.Random(3)

    async def ask(prompt: list[int]) -> None:
        generation = await pair.submit(prompt, LONG)
        await asyncio.sleep(rng.random() * 0.15)
        generation.cancel()

    for _ in range(3):
        await asyncio.gather(*(ask(p) for p in ALL))
    assert await all_pages_are_back(pair)
    assert sum(pair.states().values()) == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_that_no_unit_takes_is_told_so_at_its_deadline(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "deadlines", Deadlines(queued=0.3))
    pair.crew.drain("decode-0", force=True)
    with pytest.raises(Unavailable, match=r"no unit could take the request within 0.3 s: no decode unit: none takes"):
        await asyncio.wait_for(pair.submit(ALL[2], LONG), 3)
    pair.crew.undrain("decode-0")


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_that_wait_for_a_unit_are_looked_at_when_there_is_one(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_looks, choose = 0, pair.crew.choose

    def counted(*args: Any) -> RequestPart | None:
        nonlocal n_looks
        n_looks += 1
        return choose(*args)

    monkeypatch.setattr(pair.crew, "choose", counted)
    pair.crew.drain("decode-0", force=True)
    try:
        waiting = [asyncio.create_task(ask_all(pair, [p], GREEDY)) for p in ALL]
        await asyncio.sleep(0.3)
        assert n_looks == len(ALL)
        waiting[0].cancel()
        assert await until(lambda: len(pair._parked) == len(ALL) - 1, 5), "who has left is not remembered"
    finally:
        pair.crew.undrain("decode-0")
    assert await asyncio.gather(*waiting[1:]) == [[says(p, GREEDY)] for p in ALL[1:]]
    assert not pair._parked


@pytest.mark.asyncio(loop_scope="module")
async def test_others_are_heard_while_many_requests_are_given_to_a_unit_that_is_there_again(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, choose = list[int](), pair.crew.choose

    def slow(flight: Flight, side: Side, *args: Any) -> RequestPart | None:
        """Each takes a turn of its own."""
        if side == "decode":
            order.append(flight.priority)
            time.sleep(0.002)
        return choose(flight, side, *args)

    monkeypatch.setattr("brigade.engine.fleet.TURN", 0.001)
    pair.crew.drain("decode-0", force=True)
    waiting = [asyncio.create_task(pair.submit(p, GREEDY, priority=-i)) for i, p in enumerate(ALL)]
    assert await until(lambda: len(pair._parked) == len(ALL), 5)
    monkeypatch.setattr(pair.crew, "choose", slow)
    pair.crew.undrain("decode-0")
    left = set[int]()
    while pair._parked:
        left.add(len(pair._parked))
        await asyncio.sleep(0)
    assert len(left) == len(ALL), "this task ran between any two of them"
    assert order == sorted(order), "the most urgent ones came first"
    assert [await said(generation) for generation in await asyncio.gather(*waiting)] == [says(p, GREEDY) for p in ALL]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_waits_no_longer_for_a_prefill_unit_than_for_a_decode_unit(
    pair: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn, may_start = Keeper.spawn, asyncio.Event()

    async def later(self: Keeper, progress: Callable[[Loading], None]) -> None:
        await may_start.wait()
        await spawn(self, progress)

    monkeypatch.setattr(Keeper, "spawn", later)
    monkeypatch.setattr(pair, "deadlines", Deadlines(queued=0.5, prefilling=30))
    os.kill(pids(pair, "prefill")[0], signal.SIGKILL)
    assert await until(lambda: not pair.health().ready, 5)
    failure = await asyncio.wait_for(said(await pair.submit(ALL[2], LONG)), 3)
    assert re.search(r"no unit could take the request within 0.5 s: no .*prefill", str(failure))
    may_start.set()
    assert await until(lambda: pair.health().ready, 20)
    assert await all_pages_are_back(pair)


LAYOUTS = {
    "all in one, two ranks": config(unit("mixed-0", ranks=2)),
    "two ranks to one": config(unit("prefill-0", ranks=2, micro_batches=2), unit("decode-0")),
    "one rank to two, another chunk": config(
        unit("prefill-0", depth=2, max_step_tokens=24), unit("decode-0", ranks=2, depth=2)
    ),
    "little room, drafts, TCP": config(
        unit("prefill-0", drafts=1), unit("decode-0", max_running=3, kv_bytes=2 << 20, drafts=1), link="tcp"
    ),
    "NIXL": config(unit("prefill-0", ranks=2), unit("decode-0"), link="nixl"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
async def test_no_layout_no_link_and_no_schedule_changes_the_text(layout: FleetConfig) -> None:
    if layout.link == "nixl" and not installed():
        pytest.skip("nixl-cu12 is not installed")
    async with running(layout) as served:
        for seed in range(3):  # what later rounds find in prefix caches is the same too
            assert await ask_at_random(served, random.Random(seed)) == [says(p, GREEDY) for p in ALL]
        assert bool(served.transfers["fetched"]) == (len(layout.units) > 1)
        assert await all_pages_are_back(served)


async def ask_at_random(fleet: Fleet, rng: random.Random) -> list[list[int] | str]:
    """ALL, in any order and with any gaps, beside clients that leave; the answers in the order of ALL."""
    answers: dict[int, asyncio.Task[list[int] | str]] = {}
    for i in rng.sample(range(len(ALL)), len(ALL)):
        answers[i] = asyncio.create_task(said(await fleet.submit(ALL[i], GREEDY)))
        leaves = await fleet.submit(rng.choice(ALL), LONG)
        await asyncio.sleep(rng.choice((0, 0, 0.01, 0.05)))
        leaves.cancel()
    return [await answers[i] for i in range(len(ALL))]


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ((unit("prefill-0"), unit("decode-0", page=8)), "page must be the same"),
        ((unit("prefill-0"), unit("decode-0", drafts=1)), "drafts must be the same"),
        ((unit("prefill-0"),), "at least one prefill unit and one decode unit, or a mixed one"),
        ((unit("mixed-0"), unit("mixed-0")), "two units are called mixed-0"),
    ],
)
def test_a_fleet_that_cannot_work_together_is_refused(units: tuple[UnitConfig, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FleetConfig(units=units)


async def test_a_unit_that_cannot_load_ends_the_others() -> None:
    before = workers()
    with pytest.raises(LoadError, match="kv"):
        await Fleet.start(config(unit("prefill-0"), unit("decode-0", kv_bytes=1)))
    assert workers() <= before


async def test_a_link_that_is_not_installed_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_start, "installed", lambda: False)
    before = workers()
    with pytest.raises(LoadError, match=r"nixl-cu12 is not here; install it with: pip install 'brigade\[nixl\]'"):
        await Fleet.start(config(link="nixl"))
    assert workers() <= before


def test_ranks_wait_longer_than_the_gateway() -> None:
    deadlines = config().deadlines
    assert deadlines.adopting < handing.LEASE
    assert max(deadlines.prefilling, deadlines.transferring) < handing.RESERVATION
    assert deadlines.adopting > handing.TRANSFER
