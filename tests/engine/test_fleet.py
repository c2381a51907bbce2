"""Prompts computed by one unit and continued by another say what one rank says, and nothing is left behind."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from brigade import Brigade, SamplingParams
from brigade.comm.kv.nixl import installed
from brigade.engine import fleet_start, handing
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.generation import Generation
from brigade.engine.output import LoadError, Unobserved
from brigade.spec.config import read_spec
from tests.engine.asking import until
from tests.engine.conftest import workers

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, max_tokens=24, seed=5, presence_penalty=0.4, ignore_eos=True)
MANY = [5 + i % 700 for i in range(800)]


def some_prompts(n: int, seed: int = 7) -> list[list[int]]:
    """Of very different lengths; some begin alike."""
    rng, vocab = random.Random(seed), read_spec(DEMO_MODEL).vocab
    prompts = [[rng.randrange(5, vocab) for _ in range(rng.choice((1, 2, 9, 40, 70, 150)))] for _ in range(n)]
    return [*prompts, [*prompts[-1], 5, 6, 7], [*prompts[0], 8, 9], prompts[-1]]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, ...], list[list[int]]]:
    """What one rank says to every prompt: greedy, long and drawn."""
    prompts = some_prompts(9) + [[5 + i, 6, 7] for i in range(6)] + [MANY]
    with Brigade(max_step_tokens=64) as model:
        says = [[c.token_ids for c in model.generate(prompts, params)] for params in (GREEDY, LONG, DRAWN)]
    return {tuple(p): [row[i] for row in says] for i, p in enumerate(prompts)}


BASE = EngineConfig(max_step_tokens=64, max_running=16, rank_deadline=20)


def unit(name: str, **engine: int) -> UnitConfig:
    """`name`: of its role, and a number."""
    role = name.partition("-")[0]
    return UnitConfig(name=name, role=role, engine=replace(BASE, **engine))  # type: ignore[arg-type]


def config(prefill: dict[str, int] | None = None, decode: dict[str, int] | None = None, **fleet: object) -> FleetConfig:
    units = unit("prefill-0", **(prefill or {})), unit("decode-0", **(decode or {}))
    return FleetConfig(units=units, **fleet)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(config: FleetConfig) -> AsyncIterator[Fleet]:
    before = workers()
    fleet = await Fleet.start(config)
    try:
        yield fleet
    finally:
        await fleet.close()
        assert workers() <= before


async def said(generation: Generation) -> list[int]:
    return [t async for delta in generation for t in delta.tokens]


async def ask_all(fleet: Fleet, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    generations = []
    for prompt in prompts:
        generations.append(await fleet.submit(prompt, params))
        await asyncio.sleep(random.choice((0, 0, 0.01)))
    return list(await asyncio.gather(*map(said, generations)))


async def all_pages_are_back(fleet: Fleet, seconds: float = 5) -> bool:
    return await until(lambda: not fleet.stats().pages_used and not fleet.stats().running, seconds)


def pids(fleet: Fleet, role: str) -> list[int]:
    return [
        process.pid
        for member in fleet.crew.members
        if member.role == role and member.engine._unit is not None
        for host in member.engine._unit.hosts
        for process in host.processes.values()  # type: ignore[attr-defined]
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[Fleet]:
    async with running(config()) as fleet:
        yield fleet


@pytest.mark.asyncio(loop_scope="module")
async def test_greedy_and_drawn_text_is_that_of_one_rank(
    pair: Fleet, alone: dict[tuple[int, ...], list[list[int]]]
) -> None:
    prompts = some_prompts(9)
    fetched = pair.transfers["fetched"]
    assert await ask_all(pair, prompts, GREEDY) == [alone[tuple(p)][0] for p in prompts]
    assert await ask_all(pair, prompts, DRAWN) == [alone[tuple(p)][2] for p in prompts]
    assert pair.transfers["fetched"] - fetched == 2 * len(prompts)
    assert not pair.transfers["computed"]
    assert await all_pages_are_back(pair)


@pytest.mark.asyncio(loop_scope="module")
async def test_one_token_and_stop_tokens_end_on_the_prefill_rank(
    pair: Fleet, alone: dict[tuple[int, ...], list[list[int]]]
) -> None:
    prompt = some_prompts(9)[0]
    want, n = alone[tuple(prompt)][0], pair.transfers["fetched"]
    assert await said(await pair.submit(prompt, replace(GREEDY, max_tokens=1))) == want[:1]
    assert await said(await pair.submit(prompt, replace(GREEDY, stop_token_ids=(want[0],)))) == want[:1]
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
    (transfer,) = [lap for lap in decode.turns if lap[0] == handing.TRANSFER_SPAN]
    assert transfer[3] == taking
    assert transfer[2] <= min(step.begin for step in decode.steps)


@pytest.mark.asyncio(loop_scope="module")
async def test_clients_that_leave_at_any_moment_leave_nothing_behind(pair: Fleet) -> None:
    rng = random.Random(3)

    async def ask(prompt: list[int]) -> None:
        generation = await pair.submit(prompt, LONG)
        await asyncio.sleep(rng.random() * 0.15)
        generation.cancel()

    for _ in range(3):
        await asyncio.gather(*(ask(p) for p in some_prompts(9)))
    assert await all_pages_are_back(pair)
    assert sum(pair.states().values()) == 0


LAYOUTS = [
    ({"ranks": 2, "micro_batches": 2}, {}, {}),
    ({"depth": 2}, {"ranks": 2, "depth": 2}, {}),
    ({}, {"max_running": 3, "kv_bytes": 2 << 20}, {"link": "tcp"}),
    pytest.param(
        *({"ranks": 2}, {}, {"link": "nixl"}),
        marks=pytest.mark.skipif(not installed(), reason="nixl-cu12 is not installed"),
    ),
]


@pytest.mark.parametrize(("prefill", "decode", "fleet"), LAYOUTS)
async def test_no_layout_and_no_link_changes_the_text(
    alone: dict[tuple[int, ...], list[list[int]]],
    prefill: dict[str, int],
    decode: dict[str, int],
    fleet: dict[str, object],
) -> None:
    prompts = [*some_prompts(9), MANY]
    async with running(config(prefill, decode, **fleet)) as served:
        assert await ask_all(served, prompts, GREEDY) == [alone[tuple(p)][0] for p in prompts]
        assert await ask_all(served, prompts, GREEDY) == [alone[tuple(p)][0] for p in prompts]
        assert served.transfers["fetched"]
        assert await all_pages_are_back(served)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_rank_that_is_killed_costs_time_and_no_text(
    alone: dict[tuple[int, ...], list[list[int]]], side: str
) -> None:
    prompts = [[5 + i, 6, 7] for i in range(6)] + some_prompts(9)
    async with running(config()) as fleet:
        generations = [await fleet.submit(p, LONG) for p in prompts]
        answers = [asyncio.create_task(said(g)) for g in generations]
        assert await until(lambda: fleet.states()["decoding"] >= 2, 10)
        os.kill(pids(fleet, side)[0], signal.SIGKILL)
        got = await asyncio.wait_for(asyncio.gather(*answers), 60)
        assert got == [alone[tuple(p)][1] for p in prompts]
        assert await all_pages_are_back(fleet)
        assert fleet.health().ready


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ((unit("prefill-0"), unit("decode-0", page=8)), "page must be the same"),
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
        await Fleet.start(config({}, {"kv_bytes": 1}))
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
