"""A unit of several ranks says what one rank says; it sleeps together, and no rank's end leaves anybody waiting."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from brigade import Brigade, SamplingParams
from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.output import LoadError, Unavailable
from brigade.spec.config import read_spec
from tests.engine.conftest import workers

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)


def some_prompts(n: int, vocab: int) -> list[list[int]]:
    """Of very different lengths; two of them begin alike."""
    rng = random.Random(7)
    prompts = [[rng.randrange(5, vocab) for _ in range(rng.choice((1, 2, 9, 40, 70)))] for _ in range(n)]
    return [*prompts, [*prompts[-1], 5, 6, 7]]


def texts(config: dict[str, object], prompts: list[list[int]]) -> list[list[int]]:
    with Brigade(**config) as model:  # type: ignore[arg-type]
        return [c.token_ids for c in model.generate(prompts, GREEDY)]


@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": 2},
        {"ranks": 3, "depth": 2, "max_step_tokens": 32, "max_running": 3},
        {"ranks": 4, "weights": "int8"},
        {"ranks": 3, "dtype": "float32"},
        {"ranks": 2, "wire": "int8"},
        {"ranks": 3, "wire": "fp8"},
        {"ranks": 4, "wire": "bf16", "weights": "int8"},
        {"ranks": 4, "wire": "fp8", "dtype": "float32"},
        {"ranks": 2, "micro_batches": 2},
        {"ranks": 4, "micro_batches": 2, "depth": 2, "max_step_tokens": 32, "max_running": 3},
        {"ranks": 3, "micro_batches": 1},
        {"ranks": 3, "micro_batches": 2, "dtype": "float32"},
        {"ranks": 3, "drafts": 1, "redundant_experts": 5, "micro_batches": 2, "wire": "int8", "max_running": 3},
    ],
    ids=[
        *("2 ranks", "3 uneven ranks, plans ahead, small chunks", "4 ranks, int8", "3 ranks on torch"),
        *("int8 on the wire", "fp8 on the wire", "bf16 on the wire", "fp8 on the wire, torch"),
        *("2 micro-batches", "2 micro-batches, plans ahead, small chunks", "1 micro-batch", "2 micro-batches, torch"),
        "drafts, redundant experts, 2 micro-batches, int8 on the wire",
    ],
)
def test_greedy_text_does_not_depend_on_ranks(settings: dict[str, object]) -> None:
    prompts = some_prompts(9, read_spec(DEMO_MODEL).vocab)
    alone = {key: value for key, value in settings.items() if key in ("weights", "dtype", "wire")}
    assert texts(settings, prompts) == texts(alone, prompts)


def test_what_a_wire_rounds_is_rounded_on_one_rank_too() -> None:
    prompts = some_prompts(20, read_spec(DEMO_MODEL).vocab)
    assert texts({"wire": "fp8"}, prompts) != texts({}, prompts)


def test_more_ranks_than_experts_are_refused() -> None:
    others = workers()
    with pytest.raises(LoadError, match="ranks is 33, but the model has only 32 routed experts"):
        asyncio.run(Engine.start(EngineConfig(ranks=33)))
    assert workers() <= others


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Engine]:
    engine = await Engine.start(EngineConfig(ranks=2, rank_deadline=1.0, threads=1))
    yield engine
    await engine.close()


def pids(engine: Engine) -> list[int]:
    assert engine._unit is not None
    [host] = engine._unit.hosts
    return [host.processes[rank].pid for rank in host.ranks]  # type: ignore[attr-defined]


async def answered(engine: Engine) -> int:
    return sum([len(d.tokens) async for d in await engine.submit([5, 6, 7], GREEDY)])


async def test_an_idle_unit_sleeps_and_wakes_at_once(pair: Engine) -> None:
    await answered(pair)
    processes = [psutil.Process(pid) for pid in pids(pair)]

    def used() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in processes)

    await asyncio.sleep(0.2)
    before = used()
    await asyncio.sleep(1.0)
    assert used() - before < 0.1, "it does not spin"
    first = []
    for _ in range(5):
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        async for _ in await pair.submit([5, 6, 7], GREEDY):
            first.append(time.monotonic() - begin)
            break
    assert await answered(pair) == GREEDY.max_tokens
    assert min(first) < 0.1  # the bench says how long; here it is no more than that it does not wait for a deadline


async def test_requests_are_shared_out_and_all_pages_come_back(pair: Engine) -> None:
    generations = [await pair.submit([5 + i, 6, 7], LONG) for i in range(6)]
    while pair.stats().running < 6:
        await asyncio.sleep(0.01)
    assert [s.running for s in pair.rank_stats()] == [3, 3]
    for generation in generations:
        generation.cancel()
    async with asyncio.timeout(5):
        while pair.stats().pages_used or pair.stats().running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_is_lost_mid_step_is_replaced_in_place_and_everybody_hears_in_time(
    pair: Engine, caplog: pytest.LogCaptureFixture, number: signal.Signals, rank: int
) -> None:
    old = pids(pair)
    generations = [await pair.submit([5 + i, 6, 7], LONG) for i in range(4)]
    async for _ in generations[0]:
        break

    async def rest(generation: object) -> str:
        try:
            async for _ in generation:  # type: ignore[attr-defined]
                pass
        except Unavailable:
            return "error"
        return "answer"

    begin = time.monotonic()
    os.kill(old[rank], number)
    ends = await asyncio.wait_for(asyncio.gather(*map(rest, generations)), 6)
    assert "error" in ends
    assert time.monotonic() - begin < 5
    assert f"rank {rank}" in caplog.text, "the log names the culprit"
    assert await asyncio.wait_for(answered(pair), 25) == GREEDY.max_tokens
    assert pair.health().ready
    assert set(old) & workers() == {old[1 - rank]}, "the other rank stayed"
