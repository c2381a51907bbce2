"""A rank of several that is killed or frozen is replaced in place: the others' requests go on with the same text."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from brigade import SamplingParams
from brigade.engine import local_host, unit
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.engine.generation import Generation
from brigade.engine.output import Unavailable
from tests.engine.asking import until
from tests.engine.conftest import workers

pytestmark = pytest.mark.timeout(120)

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Ranks:
    """An engine of several ranks, whose processes the tests kill and stop."""

    def __init__(self, engine: Engine, others: set[int]) -> None:
        self.engine, self.others = engine, others

    def pid(self, rank: int) -> int:
        assert self.engine._unit is not None
        [host] = self.engine._unit.hosts
        return host.processes[rank].pid  # type: ignore[attr-defined, no-any-return]

    def pids(self) -> list[int]:
        return [self.pid(rank) for rank in range(self.engine.config.ranks)]

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pid(rank)
        os.kill(pid, how)
        return pid

    def on(self, rank: int, generations: list[Generation]) -> list[Generation]:
        return [g for g in generations if self.engine._router.rank_of(g.rid) == rank]

    async def fresh(self, known: set[int]) -> int:
        """The process that comes in place of a lost one."""
        assert await until(lambda: bool(workers() - self.others - known), 10)
        return (workers() - self.others - known).pop()

    async def is_whole(self, seconds: float = 20) -> bool:
        return await until(lambda: self.engine.health().ready, seconds)

    async def ask(self, asked: list[list[int]]) -> list[list[int]]:
        return await asyncio.gather(*[tokens(await self.engine.submit(p, LONG)) for p in asked])

    async def answer(self) -> list[int]:
        return await tokens(await self.engine.submit([5, 6, 7], SHORT))


@contextlib.asynccontextmanager
async def serving(n: int = 2, **settings: Any) -> AsyncIterator[Ranks]:
    others = workers()
    engine = await Engine.start(EngineConfig(ranks=n, threads=1, **settings))
    try:
        yield Ranks(engine, others)
    finally:
        await engine.close()
        assert workers() <= others


async def tokens(generation: Generation) -> list[int]:
    return [token async for delta in generation for token in delta.tokens]


async def ends(generations: list[Generation], seconds: float) -> list[list[int] | str]:
    """What became of each: its tokens, or "lost" where it ended with Unavailable."""
    results = await asyncio.wait_for(asyncio.gather(*map(tokens, generations), return_exceptions=True), seconds)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Unavailable):
            raise result
    return ["lost" if isinstance(result, BaseException) else result for result in results]


def prompts(n: int, length: int) -> list[list[int]]:
    """Half of each is common, so pages are shared."""
    rng = random.Random(3)
    stem = [rng.randrange(5, 4000) for _ in range(length // 2)]
    return [stem + [rng.randrange(5, 4000) for _ in range(length - length // 2 + i)] for i in range(n)]


def soon(_: Ranks) -> bool:
    """In the middle of the prompts."""
    return True


def later(ranks: Ranks) -> bool:
    """While all decode."""
    return ranks.engine.stats().running >= 6


@pytest.mark.parametrize(
    ("depth", "how", "when"),
    [
        (1, signal.SIGKILL, soon),
        (2, signal.SIGKILL, soon),
        (2, signal.SIGKILL, later),
        (2, signal.SIGSTOP, later),
        (1, signal.SIGSEGV, later),
    ],
    ids=[
        "killed in prefill",
        "killed in prefill, plans ahead",
        "killed, plans ahead",
        "frozen, plans ahead",
        "crashed",
    ],
)
async def test_survivors_say_what_they_would_have_said(
    depth: int, how: signal.Signals, when: Callable[[Ranks], bool], caplog: pytest.LogCaptureFixture
) -> None:
    # A machine that is busy takes its time to replace a rank.
    async with serving(depth=depth, max_step_tokens=48, max_running=8, rank_deadline=30.0) as ranks:
        asked = prompts(6, 150)
        want = await ranks.ask(asked)
        assert await ranks.answer()
        old = ranks.pids()
        generations = [await ranks.engine.submit(p, LONG) for p in asked]
        mine, others = ranks.on(1, generations), ranks.on(0, generations)
        assert mine
        assert others
        assert await until(lambda: when(ranks), 10)
        ranks.kill(1, how)
        got = await ends(generations, 60)
        assert not [g for g, end in zip(generations, got, strict=True) if g in others and end == "lost"]
        for g, text, end in zip(generations, want, got, strict=True):
            assert end == text or (g in mine and end == "lost")
        assert "lost" in got
        assert "rank 1" in caplog.text, "the log names the culprit"
        assert await ranks.is_whole()
        assert ranks.pid(0) == old[0], "the other rank stayed"
        assert ranks.pid(1) != old[1]
        assert await ranks.ask(asked) == want


async def test_where_only_the_deadline_tells_that_a_rank_hangs_all_requests_have_ended_by_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_host, "LOOK_EVERY", 3600)  # as if it hung in some other way than by a signal
    async with serving(rank_deadline=2.0) as ranks:
        generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 20)]
        for g in generations:
            await anext(g)
        began, old = time.monotonic(), ranks.kill(1, signal.SIGSTOP)
        assert "lost" in await ends(generations, 10)
        assert 1.5 < time.monotonic() - began < 3.5, "the deadline, on a machine that may be busy"
        assert "rank 1" in caplog.text
        assert await ranks.is_whole()
        assert not psutil.pid_exists(old)


async def test_requests_of_the_lost_rank_hear_at_once_and_ready_names_it() -> None:
    async with serving(rank_deadline=30.0) as ranks:
        generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 20)]
        mine = ranks.on(1, generations)
        for g in generations:
            await anext(g)
        began = time.monotonic()
        ranks.kill(1)
        assert await ends(mine, 1) == ["lost"] * len(mine)
        assert time.monotonic() - began < 1
        health = ranks.engine.health()
        assert not health.ready
        assert "rank 1" in health.reason
        assert await ranks.is_whole()


async def test_an_idle_unit_is_whole_again_before_anybody_asks_and_sleeps() -> None:
    async with serving(rank_deadline=1.5) as ranks:
        want = await ranks.answer()
        for how in signal.SIGKILL, signal.SIGSTOP:
            old = ranks.kill(0, how)
            assert await until(lambda: not ranks.engine.health().ready, 6)
            assert await ranks.is_whole()
            assert not psutil.pid_exists(old)
            assert await ranks.answer() == want
        await asyncio.sleep(0.3)
        processes = [psutil.Process(pid) for pid in ranks.pids()]
        before = sum(sum(p.cpu_times()[:2]) for p in processes)
        await asyncio.sleep(1)
        assert sum(sum(p.cpu_times()[:2]) for p in processes) - before < 0.1, "it does not spin"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_another_rank_is_lost_while_the_first_is_replaced(how: signal.Signals) -> None:
    async with serving(3, rank_deadline=30.0) as ranks:
        asked = prompts(6, 40)
        want = await ranks.ask(asked)
        generations = [await ranks.engine.submit(p, LONG) for p in asked]
        kept = ranks.on(1, generations)
        assert kept
        first = [list((await anext(g)).tokens) for g in generations]
        old = ranks.pids()
        ranks.kill(0)
        await ranks.fresh(set(old))
        ranks.kill(2, how)
        got = await ends(generations, 60)
        for text, begin, end in zip(want, first, got, strict=True):
            assert end == "lost" or [*begin, *end] == text
        assert "lost" not in [end for g, end in zip(generations, got, strict=True) if g in kept]
        assert await ranks.is_whole(30)
        assert ranks.pid(1) == old[1]
        assert await ranks.answer()


async def test_a_replacement_that_dies_again_and_again_ends_the_wait_of_the_survivors_and_is_tried_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unit, "LONGEST_PAUSE", 0.2)
    async with serving(rank_deadline=1.0) as ranks:
        generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 20)]
        for g in generations:
            await anext(g)
        seen = set(ranks.pids())
        began = time.monotonic()
        ranks.kill(1)
        over = asyncio.ensure_future(ends(generations, 10))
        over.add_done_callback(lambda _: times.append(time.monotonic() - began))
        times: list[float] = []
        assert await until(lambda: not ranks.engine.health().ready, 2)
        asked = asyncio.ensure_future(ranks.answer())
        while not over.done() or len(seen) < 5:
            pid = await ranks.fresh(seen)
            seen.add(pid)
            assert not ranks.engine.health().ready
            os.kill(pid, signal.SIGKILL)
        assert await over == ["lost"] * len(generations)
        assert times[0] < 2, "survivors wait for rank_deadline"
        assert "rank 1" in ranks.engine.health().reason
        assert await asyncio.wait_for(asked, 20)
        assert ranks.pid(0) in seen
        assert await until(lambda: ranks.engine.stats().pages_used == 0, 3), "aborted on their rank, too"


async def test_a_replacement_that_freezes_while_it_loads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(rank_deadline=30.0) as ranks:
        want, old = await ranks.answer(), set(ranks.pids())
        monkeypatch.setattr(local_host, "LOOK_EVERY", 3600)
        monkeypatch.setattr(unit, "LOAD_SILENCE", 3.0)
        await asyncio.sleep(0.5)  # the look that is under way
        ranks.kill(1)
        frozen = await ranks.fresh(old)
        os.kill(frozen, signal.SIGSTOP)
        assert await until(lambda: not psutil.pid_exists(frozen), 10)
        monkeypatch.undo()  # a busy machine may need longer than that for the next one
        assert await ranks.is_whole()
        assert await ranks.answer() == want


async def test_when_all_ranks_are_lost_the_unit_is_restarted() -> None:
    async with serving(rank_deadline=30.0) as ranks:
        want, old = await ranks.answer(), ranks.pids()
        generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 20)]
        for rank in range(2):
            ranks.kill(rank)
        assert await ends(generations, 2) == ["lost"] * 4
        assert await ranks.is_whole()
        assert not set(ranks.pids()) & set(old)
        assert await ranks.answer() == want


async def test_ranks_are_lost_one_after_another_and_all_pages_come_back() -> None:
    async with serving(depth=2, max_step_tokens=32, max_running=8, rank_deadline=30.0) as ranks:
        want = await ranks.answer()
        for i in range(4):
            generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 60)]
            await anext(generations[i])
            ranks.kill(i % 2)
            assert "lost" in await ends(generations, 30)
            assert await ranks.answer() == want
        assert await until(lambda: ranks.engine.stats().pages_used == 0, 3)
        assert await until(lambda: ranks.engine.stats().running == 0, 3)


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05])
async def test_closing_while_a_rank_is_replaced_leaves_no_process(seconds: float) -> None:
    async with serving(rank_deadline=30.0) as ranks:
        generations = [await ranks.engine.submit(p, LONG) for p in prompts(4, 20)]
        ranks.kill(1)
        assert await until(lambda: not ranks.engine.health().ready, 2)
        await asyncio.sleep(seconds)
        await asyncio.wait_for(ranks.engine.close(), 6)
        assert await ends(generations, 1) == ["lost"] * 4
