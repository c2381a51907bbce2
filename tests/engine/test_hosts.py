"""A unit over several hosts says what one rank says, and no fault of a host leaves anybody waiting."""

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
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
from tests.engine.hosting import SECRET, Supervisor, free_port, layout_of, secret_file, several, started, supervisor
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
    others = workers()
    async with several(*sizes, **settings) as engine:
        assert await asyncio.gather(*(tokens(engine, p) for p in PROMPTS)) == expected
    assert workers() <= others


class Pair:
    """An engine here, and a second host with two ranks under a supervisor of its own."""

    def __init__(self, engine: Engine, port: int, secret: Path, other: Supervisor) -> None:
        self.engine, self.port, self.secret, self.other = engine, port, secret, other

    def pid_here(self) -> int:
        """The process of rank 0."""
        assert self.engine._unit is not None
        return self.engine._unit.hosts[0].processes[0].pid  # type: ignore[attr-defined, no-any-return]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kept(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    """For all tests after which the unit must serve again."""
    port, secret = free_port(), secret_file(tmp_path_factory.mktemp("hosts"))
    other = Supervisor(port, 1, secret)
    config = EngineConfig(ranks=3, threads=1, rank_deadline=5)
    hosts = HostsConfig(layouts=(layout_of(1, 2),), secret=SECRET, port=port, wait=60)
    base = await started(config, hosts)
    pair = Pair(base.engines[0], port, secret, other)
    yield pair
    await base.close()
    try:
        assert await asyncio.to_thread(pair.other.process.wait, 15) == 0, "it ends with the head"
    finally:
        pair.other.close()


@pytest_asyncio.fixture(loop_scope="module")
async def pair(kept: Pair) -> Pair:
    assert await until(lambda: kept.engine.health().ready, 30), kept.engine.health()
    return kept


async def ready_at(engine: Engine) -> float:
    """When the unit is whole again."""
    assert await until(lambda: engine.health().ready, 40), engine.health()
    return time.monotonic()


async def how_all_end(
    engine: Engine, fault: Callable[[], object], what: str
) -> tuple[list[str], float, "asyncio.Task[float]"]:
    """Start requests on all ranks and break something: how the requests end, after how many seconds the last one does,
    and when the unit is whole again. `pytest -s` shows the times."""
    generations = [await engine.submit([5 + i, 6, 7], LONG) for i in range(6)]
    assert await until(lambda: all(s.running for s in engine._keeper.pulse.stats), 10)

    async def rest(generation: object) -> str:
        try:
            async for _ in generation:  # type: ignore[attr-defined]
                pass
        except Unavailable:
            return "error"
        return "answer"

    ends = [asyncio.ensure_future(rest(g)) for g in generations]
    began = time.monotonic()
    fault()
    assert await until(lambda: not engine.health().ready, 6)
    noticed = time.monotonic() - began
    whole = asyncio.create_task(ready_at(engine))
    how = await asyncio.wait_for(asyncio.gather(*ends), 20)
    last = time.monotonic() - began
    print(f"{what}: noticed {noticed:.1f} s, last client {last:.1f} s, {how.count('answer')} of 6 answered")
    return how, last, whole


async def serves_again(pair: Pair, expected: list[list[int]], whole: "asyncio.Task[float]", since: float) -> None:
    """That the unit becomes whole and says what it said before."""
    print(f"serving again after {await whole - since:.1f} s")
    assert await asyncio.gather(*(tokens(pair.engine, p) for p in PROMPTS)) == expected


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("rank", "number"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP), (2, signal.SIGKILL)]
)
async def test_a_rank_that_is_lost_is_named_and_replaced(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture, rank: int, number: signal.Signals
) -> None:
    # a process there does not say which rank it is
    pid = pair.pid_here() if rank == 0 else pair.other.ranks()[rank - 1].pid
    others = {p.pid for p in pair.other.ranks()} - {pid}
    caplog.set_level(logging.WARNING)
    what = f"rank {rank}, {number.name}"
    began = time.monotonic()
    ends, _, whole = await how_all_end(pair.engine, lambda: os.kill(pid, number), what)
    assert "error" in ends, "those of the lost rank"
    assert re.search("lost and being replaced: rank 0" if rank == 0 else "replaced: rank [12]", caplog.text)
    await serves_again(pair, expected, whole, began)
    assert await until(lambda: not psutil.pid_exists(pid), 5)
    assert others <= {p.pid for p in pair.other.ranks()}, "the others stay"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_supervisor_that_is_lost_takes_its_host_along_and_another_one_brings_it_back(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    old, ranks = pair.other, [p.pid for p in pair.other.ranks()]
    here = pair.pid_here()
    what = f"supervisor, {number.name}"
    ends, seconds, whole = await how_all_end(pair.engine, lambda: os.kill(old.process.pid, number), what)
    assert "error" in ends
    assert seconds < pair.engine.config.rank_deadline + 0.5
    assert "host 127.0.0.2 (ranks 1 to 2) is gone" in caplog.text
    assert not pair.engine.health().ready
    pair.other = Supervisor(pair.port, 1, pair.secret)
    try:
        await serves_again(pair, expected, whole, time.monotonic())
    finally:
        if number == signal.SIGSTOP:
            os.kill(old.process.pid, signal.SIGCONT)
            assert await until(lambda: not any(map(psutil.pid_exists, ranks)), 10), "its old ranks end"
        old.process.kill()
        old.process.wait()
    assert here == pair.pid_here(), "the head's rank kept its process"
    assert await until(lambda: not any(map(psutil.pid_exists, ranks)), 10)


async def test_a_second_supervisor_for_a_host_that_is_there_does_no_harm(
    pair: Pair, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with supervisor(pair.port, 1, pair.secret) as second:
        assert await until(lambda: "which has joined already" in caplog.text, 15)
        assert second.process.poll() is None, "it waits for its turn"
        assert pair.engine.health().ready
        assert await tokens(pair.engine, PROMPTS[0]) == expected[0]
