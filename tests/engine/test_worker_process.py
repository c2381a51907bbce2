"""The life of the worker process: restarts that cannot fail for good, ends that leave nothing behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from brigade.engine import keeper, process, unit
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.engine.output import LoadError, Unavailable
from tests.engine.asking import GREEDY, LONG, ask, rest, start, until
from tests.engine.conftest import workers
from tests.engine.watched import serving

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]


async def test_the_shortest_deadline_that_is_allowed_lets_an_idle_worker_live() -> None:
    async with serving(step_deadline=0.1) as served:
        pid = served.pid
        await asyncio.sleep(1.3)
        assert workers() - served.others == {pid}


async def test_a_restart_that_fails_because_no_process_can_be_made_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as served:
        await ask(served.engine, "Once")
        make, failures = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")]

        def refuse_once(*args: Any, **kwargs: Any) -> Any:
            if failures:
                raise failures.pop()
            return make(*args, **kwargs)

        monkeypatch.setattr(process.subprocess, "Popen", refuse_once)
        served.kill()
        assert await until(lambda: not served.engine.health().ready, 2)
        assert await asyncio.wait_for(ask(served.engine, "Once"), 6)


async def test_at_the_start_that_no_process_can_be_made_is_a_load_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process.subprocess, "Popen", refuse)
    with pytest.raises(LoadError, match="Resource temporarily unavailable"):
        await Engine.start(EngineConfig())


async def test_a_worker_killed_by_a_signal_without_a_name_is_replaced_too() -> None:
    async with serving() as served:
        await ask(served.engine, "Once")
        served.kill(35)
        assert await until(lambda: not served.engine.health().ready, 2)
        assert await asyncio.wait_for(ask(served.engine, "Once"), 6)


async def test_restarting_goes_on_after_a_night_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on a network disk that is away until morning."""
    monkeypatch.setattr(unit, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(keeper.log, "disabled", True)
    engine, tried = Engine(EngineConfig()), 0

    async def fail(_: Any) -> None:
        nonlocal tried
        tried += 1
        raise LoadError("the disk is away")

    monkeypatch.setattr(engine._keeper, "spawn", fail)
    task = asyncio.ensure_future(engine._keeper.keep_alive())
    assert await until(lambda: task.done() or tried > 1200, 10)
    assert not task.done(), task.exception()
    task.cancel()


async def test_closing_while_requests_run_and_wait_ends_them_all_and_the_process() -> None:
    others = workers()
    engine = await Engine.start(EngineConfig(max_running=2))
    running = [await start(engine) for _ in range(2)] + [await engine.submit([5], LONG) for _ in range(3)]
    ends = asyncio.gather(*map(rest, running), return_exceptions=True)
    await asyncio.wait_for(engine.close(), 6)
    assert [type(e) for e in await asyncio.wait_for(ends, 1)] == [Unavailable] * 5
    assert workers() <= others
    await engine.close()


async def test_closing_wakes_those_who_wait_for_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    others, engine = workers(), await Engine.start(EngineConfig())
    try:
        monkeypatch.setattr(engine._keeper, "spawn", lambda _: asyncio.sleep(60))
        os.kill((workers() - others).pop(), signal.SIGKILL)
        assert await until(lambda: not engine.health().ready, 2)
        asked = asyncio.ensure_future(engine.submit([5], GREEDY))
        await asyncio.sleep(0.05)
    finally:
        await engine.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(asked, 2)


async def test_closing_while_the_model_is_loaded_leaves_no_process() -> None:
    others = workers()
    starting = asyncio.ensure_future(Engine.start(EngineConfig()))
    assert await until(lambda: bool(workers() - others), 5)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    assert workers() <= others


async def test_a_worker_killed_while_the_model_is_loaded_is_a_load_error() -> None:
    others = workers()
    starting = asyncio.ensure_future(Engine.start(EngineConfig()))
    assert await until(lambda: bool(workers() - others), 5)
    for pid in workers() - others:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(LoadError, match="SIGKILL"):
        await starting


PARENT = """
import asyncio
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from tests.engine.asking import start
from tests.engine.conftest import workers

async def main():
    engine = await Engine.start(EngineConfig())
    if {busy}:
        await start(engine)
    print(*workers(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_when_the_parent_is_killed_the_worker_ends_by_itself(busy: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(busy=busy)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    try:
        worker.wait(5)
    except psutil.TimeoutExpired:
        worker.kill()
        raise
