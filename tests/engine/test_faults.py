"""The engine in foul weather: workers that die or hang, and a parent that was paused. Nothing hangs, all recovers."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from brigade.engine import unit
from brigade.engine.generation import Generation
from brigade.engine.output import Unavailable
from tests.engine.asking import ask, rest, start, until
from tests.engine.conftest import workers
from tests.engine.watched import Served, serving

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tough() -> AsyncIterator[Served]:
    """One engine for all tests after which it must serve again."""
    async with serving(step_deadline=1.5) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def served(tough: Served) -> AsyncIterator[Served]:
    assert await until(lambda: tough.engine.health().ready, 15), tough.engine.health()
    assert await ask(tough.engine, "Once")
    yield tough
    assert await tough.engine.idle(5)


async def unavailable_within(seconds: float, generations: list[Generation]) -> None:
    """Each of them, waited for at the same time, ends with Unavailable."""
    ends = await asyncio.wait_for(asyncio.gather(*map(rest, generations), return_exceptions=True), seconds)
    assert [type(e) for e in ends] == [Unavailable] * len(generations)


async def test_when_the_worker_is_killed_all_who_wait_hear_it_and_the_next_request_is_answered(served: Served) -> None:
    engine, n = served.engine, served.restarts.n
    want = await ask(engine, "The dog")
    running = [await start(engine) for _ in range(6)]
    served.kill()
    await unavailable_within(2, running)
    assert not engine.health().ready
    assert await asyncio.wait_for(ask(engine, "The dog"), 15) == want
    assert served.restarts.n == n + 1
    assert engine.health().ready


async def test_a_worker_that_hangs_is_reported_killed_and_replaced(served: Served) -> None:
    engine, n = served.engine, served.restarts.n
    running = [await start(engine) for _ in range(2)]
    began, stopped = time.monotonic(), served.kill(signal.SIGSTOP)
    waiting = [asyncio.ensure_future(rest(g)) for g in running]
    assert await until(lambda: not engine.health().ready, 3)
    ends = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert [type(e) for e in ends] == [Unavailable] * 2
    assert time.monotonic() - began < 4
    assert await asyncio.wait_for(ask(engine, "The dog"), 15)
    assert served.restarts.n == n + 1
    assert not psutil.pid_exists(stopped)


async def test_an_idle_worker_that_hangs_is_replaced_before_anybody_asks(served: Served) -> None:
    stopped = served.kill(signal.SIGSTOP)
    assert await until(lambda: not served.engine.health().ready, 5)
    assert await until(lambda: served.engine.health().ready, 15)
    assert served.pid != stopped


async def test_a_worker_that_dies_again_and_again_while_loading_harms_nobody_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "LONGEST_PAUSE", 0.1)
    engine, seen = served.engine, {served.kill()}
    assert await until(lambda: not engine.health().ready, 2)
    asked = asyncio.ensure_future(ask(engine, "The dog"))
    for _ in range(3):
        assert await until(lambda: bool(workers() - served.others - seen), 10)
        seen.add(served.kill())
        assert not engine.health().ready
    assert await until(lambda: "SIGKILL" in engine.health().reason, 5), engine.health()
    assert await asyncio.wait_for(asked, 20)
    assert engine.health().ready


async def test_a_parent_that_was_paused_does_not_kill_its_healthy_worker(served: Served) -> None:
    """Ctrl-Z, a debugger, a long garbage collection: the silence was ours."""
    pid = served.pid
    await asyncio.sleep(0.7)
    time.sleep(served.engine.config.step_deadline + 0.5)
    await asyncio.sleep(1)
    assert workers() - served.others == {pid}
