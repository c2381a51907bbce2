"""A unit over several hosts says what one rank says, and no fault of a host leaves anybody waiting."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from brigade import Brigade
from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig, HostsConfig
from brigade.engine.output import Unavailable
from brigade.spec.config import read_spec
from tests.engine.asking import until
from tests.engine.conftest import workers
from tests.engine.hosting import SECRET, Supervisor, free_port, layout_of, secret_file, several, supervisor
from tests.engine.test_ranks import GREEDY, LONG, some_prompts

PROMPTS = some_prompts(7, read_spec(DEMO_MODEL).vocab)


async def tokens(engine: Engine, prompt: list[int]) -> list[int]:
    return [token async for delta in await engine.submit(prompt, GREEDY) for token in delta.tokens]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with Brigade() as alone:
        return [c.token_ids for c in alone.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((1, 1), {"depth": 2}),
        ((2, 1), {"max_step_tokens": 32, "max_running": 3}),
        ((1, 1, 1), {}),
        ((2, 2), {}),
    ],
    ids=["2 hosts, plans ahead", "uneven hosts, small chunks", "3 hosts", "2 hosts of 2 ranks"],
)
async def test_greedy_text_does_not_depend_on_hosts(
    sizes: tuple[int, ...], settings: dict[str, int], expected: list[list[int]]
) -> None:
    async with several(*sizes, **settings) as engine:
        assert await asyncio.gather(*(tokens(engine, p) for p in PROMPTS)) == expected
    assert not workers()


class Pair:
    """An engine here, and a second host with two ranks under a supervisor of its own."""

    def __init__(self, engine: Engine, port: int, secret: Path, other: Supervisor) -> None:
        self.engine, self.port, self.secret, self.other = engine, port, secret, other


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kept(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """For all tests after which the unit must serve again."""
    port, secret = free_port(), secret_file(tmp_path_factory.mktemp("hosts"))
    other = Supervisor(port, 1, secret)
    config = EngineConfig(ranks=3, threads=1, rank_deadline=5)
    engine = await Engine.start(config, hosts=HostsConfig(layout=layout_of(1, 2), secret=SECRET, port=port, wait=60))
    pair = Pair(engine, port, secret, other)
    yield pair
    await engine.close()
    try:
        assert await asyncio.to_thread(pair.other.process.wait, 15) == 0, "it ends with the head"
    finally:
        pair.other.close()


@pytest_asyncio.fixture(loop_scope="module")
async def pair(kept: Pair) -> Pair:
    assert await until(lambda: kept.engine.health().ready, 30), kept.engine.health()
    return kept


async def how_all_end(engine: Engine, fault: Callable[[], Awaitable[None]]) -> tuple[list[str], float]:
    """Start requests on all ranks, wait until all run, do something, and see how they end and after how long."""
    generations = [await engine.submit([5 + i, 6, 7], LONG) for i in range(6)]
    assert await until(lambda: all(s.running for s in engine._stats), 10)

    async def rest(generation: object) -> str:
        try:
            async for _ in generation:  # type: ignore[attr-defined]
                pass
        except Unavailable:
            return "error"
        return "answer"

    ends = [asyncio.ensure_future(rest(g)) for g in generations]
    began = time.monotonic()
    await fault()
    return await asyncio.wait_for(asyncio.gather(*ends), 20), time.monotonic() - began


async def serves_again(pair: Pair, expected: list[list[int]], within: float) -> float:
    """Seconds until the unit is whole, and that it says what it said before."""
    began = time.monotonic()
    assert await until(lambda: pair.engine.health().ready, within), pair.engine.health()
    took = time.monotonic() - began
    assert await asyncio.gather(*(tokens(pair.engine, p) for p in PROMPTS)) == expected
    return took


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("rank", "number"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP), (2, signal.SIGKILL)]
)
async def test_a_rank_that_is_lost_is_named_and_replaced(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture, rank: int, number: signal.Signals
) -> None:
    pid = next(iter(workers() - {p.pid for p in pair.other.ranks()})) if rank == 0 else pair.other.ranks()[rank - 1].pid
    others = {p.pid for p in pair.other.ranks()} - {pid}
    caplog.set_level(logging.WARNING)

    async def fault() -> None:
        os.kill(pid, number)
        assert await until(lambda: not pair.engine.health().ready, 6)

    ends, _ = await how_all_end(pair.engine, fault)
    assert "error" in ends, "those of the lost rank"
    assert f"rank {rank}" in caplog.text
    await serves_again(pair, expected, 25)
    assert not psutil.pid_exists(pid) or number == signal.SIGSTOP
    assert others <= {p.pid for p in pair.other.ranks()}, "the others stay"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_supervisor_that_is_lost_takes_its_host_along_and_another_one_brings_it_back(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    old, ranks = pair.other, [p.pid for p in pair.other.ranks()]
    here = workers() - set(ranks)

    async def fault() -> None:
        os.kill(old.process.pid, number)
        assert await until(lambda: not pair.engine.health().ready, 6)

    ends, seconds = await how_all_end(pair.engine, fault)
    assert "error" in ends
    assert seconds < pair.engine.config.rank_deadline + 0.5
    assert "host 127.0.0.2 (ranks 1 to 2) is gone" in caplog.text
    assert not pair.engine.health().ready
    pair.other = Supervisor(pair.port, 1, pair.secret)
    try:
        await serves_again(pair, expected, 30)
    finally:
        if number == signal.SIGSTOP:
            os.kill(old.process.pid, signal.SIGCONT)
            assert await until(lambda: not any(map(psutil.pid_exists, ranks)), 10), "its old ranks end"
        old.process.kill()
        old.process.wait()
    assert here <= workers(), "the head's rank kept its process"
    assert await until(lambda: not any(map(psutil.pid_exists, ranks)), 10)


async def test_a_second_supervisor_for_a_host_that_is_there_does_no_harm(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with supervisor(pair.port, 1, pair.secret) as second:
        assert await until(lambda: "which has joined already" in caplog.text, 15)
        assert second.process.poll() is None, "it waits for its turn"
        assert pair.engine.health().ready
        assert await tokens(pair.engine, PROMPTS[0]) == expected[0]
