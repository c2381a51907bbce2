"""Ranks of a fleet are killed and clients leave in every state of a hand-over: text stays, pages come back."""

import asyncio
import itertools
import os
import signal

import pytest

from brigade.core.handover import Deadlines, Event
from brigade.engine.fleet import Fleet
from brigade.engine.flight import Flight
from brigade.engine.generation import Generation
from brigade.engine.keeper import Keeper
from brigade.engine.output import Unavailable
from tests.engine.asking import until
from tests.engine.test_fleet import LONG, MANY, all_pages_are_back, config, pids, running, said, some_prompts
from tests.engine.test_fleet import alone as alone

Says = dict[tuple[int, ...], list[list[int]]]
STATES = ["routed", "prefilling", "transferring", "adopting", "decoding"]
SLOW = {"max_step_tokens": 16}
"""A prefill rank that takes fifty steps for MANY."""
salts = map(str, itertools.count())


async def brought_to(fleet: Fleet, state: str) -> tuple[Generation, list[int]]:
    """A generation in this state, and the processes that are stopped so that it stays there."""
    prefill, decode = pids(fleet, "prefill")[0], pids(fleet, "decode")[0]
    stopped = {"routed": [decode], "prefilling": [prefill], "adopting": [prefill]}.get(state, [])
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    generation = await fleet.submit(MANY, LONG, next(salts))
    if state == "transferring":
        stopped = [prefill]
        stop_when_offered(fleet._flights[generation.rid], prefill)
    if state == "adopting":
        assert await until(lambda: fleet.states()["prefilling"] == 1, 5)
        os.kill(decode, signal.SIGSTOP)
        os.kill(prefill, signal.SIGCONT)
        stopped = [decode]
    assert await until(lambda: fleet.states()[state] == 1, 5), fleet.states()
    return generation, stopped


def stop_when_offered(flight: Flight, pid: int) -> None:
    on = flight.on

    def stopping(event: Event) -> None:
        if event is Event.OFFERED:
            os.kill(pid, signal.SIGSTOP)
            flight.on = on  # type: ignore[method-assign]
        on(event)

    flight.on = stopping  # type: ignore[method-assign]


def resume(stopped: list[int]) -> None:
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


async def test_a_client_that_leaves_in_any_state_leaves_nothing_behind() -> None:
    async with running(config(SLOW)) as fleet:
        for state in STATES:
            generation, stopped = await brought_to(fleet, state)
            generation.cancel()
            assert sum(fleet.states().values()) == 0
            resume(stopped)
            assert await all_pages_are_back(fleet), state
        assert fleet.stats().pages_offered == fleet.stats().pages_reserved == 0


@pytest.mark.parametrize(
    ("link", "ends"),
    [("shared", {"transferring": "fetched"}), ("tcp", {"transferring": "fetched", "adopting": "computed"})],
)
async def test_a_prefill_rank_that_is_killed_while_its_rows_are_fetched(
    alone: Says, link: str, ends: dict[str, str]
) -> None:
    """The next one computes the prompt, or the decode rank does where the first token is there already."""
    async with running(config(SLOW, link=link)) as fleet:
        for state, how in ends.items():
            generation, stopped = await brought_to(fleet, state)
            os.kill(pids(fleet, "prefill")[0], signal.SIGKILL)
            assert await until(lambda: not fleet.health().ready, 5)
            resume([pid for pid in stopped if pid in pids(fleet, "decode")])
            assert await asyncio.wait_for(said(generation), 30) == alone[tuple(MANY)][1], state
            assert fleet.transfers[how] == 1, state
            assert await until(lambda: fleet.health().ready, 20)
            assert await all_pages_are_back(fleet)


async def test_a_decode_rank_that_is_killed_in_any_state(alone: Says) -> None:
    async with running(config(SLOW)) as fleet:
        for state in ("routed", "transferring", "adopting", "decoding"):
            generation, stopped = await brought_to(fleet, state)
            os.kill(pids(fleet, "decode")[0], signal.SIGKILL)
            resume([pid for pid in stopped if pid in pids(fleet, "prefill")])
            assert await asyncio.wait_for(said(generation), 30) == alone[tuple(MANY)][1], state
            assert await all_pages_are_back(fleet), state


async def test_everything_is_killed_at_once(alone: Says) -> None:
    prompts = some_prompts(9)
    async with running(config()) as fleet:
        answers = [asyncio.create_task(said(await fleet.submit(p, LONG))) for p in prompts]
        assert await until(lambda: fleet.states()["decoding"] >= 3, 10)
        for pid in pids(fleet, "prefill") + pids(fleet, "decode"):
            os.kill(pid, signal.SIGKILL)
        got = await asyncio.wait_for(asyncio.gather(*answers), 60)
        assert got == [alone[tuple(p)][1] for p in prompts]
        assert await all_pages_are_back(fleet)


async def test_no_state_lasts_longer_than_its_deadline() -> None:
    short = Deadlines(queued=1, routed=0.5, prefilling=0.5, transferring=0.5, adopting=0.5, decoding=5)
    async with running(config(SLOW, deadlines=short)) as fleet:
        for state in ("routed", "prefilling", "transferring"):
            generation, stopped = await brought_to(fleet, state)
            with pytest.raises(Unavailable, match=f"was {state} for longer than 0.5 s"):
                await asyncio.wait_for(said(generation), 3)
            resume(stopped)
            assert await all_pages_are_back(fleet)
        fleet.crew.drain("decode-0", force=True)
        with pytest.raises(Unavailable, match="no unit could take the request within 1 s: no decode unit: none takes"):
            await asyncio.wait_for(fleet.submit(some_prompts(9)[2], LONG), 3)


async def test_a_request_waits_no_longer_for_a_prefill_unit_than_for_a_decode_unit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(config(deadlines=Deadlines(queued=0.5, prefilling=30))) as fleet:
        monkeypatch.setattr(Keeper, "spawn", lambda *_: asyncio.sleep(60))
        os.kill(pids(fleet, "prefill")[0], signal.SIGKILL)
        assert await until(lambda: not fleet.health().ready, 5)
        generation = await fleet.submit(some_prompts(9)[2], LONG)
        with pytest.raises(Unavailable, match=r"no unit could take the request within 0.5 s: no .*prefill"):
            await asyncio.wait_for(said(generation), 3)
        assert await all_pages_are_back(fleet)
