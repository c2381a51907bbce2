"""Experts move between the steps of a real unit: no text changes, nothing stops, and no loss leaves ranks apart."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from brigade import Brigade
from brigade.core.moves import Move, after
from brigade.core.placement import Placement, place
from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.output import LoadError, Unavailable
from brigade.spec.config import read_spec
from brigade.spec.sampling import SamplingParams
from tests.engine.test_ranks import pids, some_prompts, texts

SPEC = read_spec(DEMO_MODEL)
LONG = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
PROMPTS = some_prompts(9, SPEC.vocab)


def alone(**settings: Any) -> list[list[int]]:
    with Brigade(**settings) as model:
        return [c.token_ids for c in model.generate(PROMPTS, LONG)]


_ALONE: dict[str, list[list[int]]] = {}


def one_rank_says(settings: dict[str, Any]) -> list[list[int]]:
    """What one rank says with these weights; each kind is asked once."""
    kind = {key: value for key, value in settings.items() if key in ("weights", "dtype")}
    return _ALONE.setdefault(str(kind), alone(**kind))


def somewhere_else(rng: random.Random, now: Placement) -> Placement:
    """For adversarial loads; or, quickly staged, a few slots of one layer that change what they hold."""
    if rng.random() < 0.2:
        load = [[rng.paretovariate(1.05) for _ in range(now.n_experts)] for _ in range(now.n_layers)]
        return place(load, n_slots=now.n_slots, n_groups=4, n_nodes=1, n_ranks=now.n_ranks)
    layer = rng.randrange(now.n_layers)
    slots = rng.sample(range(now.n_slots), 3)
    experts = [now.phy2log[layer][slot] for slot in slots]
    return after(now, [Move(layer, slot, e) for slot, e in zip(slots, experts[1:] + experts[:1], strict=True)])


async def tokens_of(engine: Engine, prompt: list[int]) -> list[int]:
    return [token async for delta in await engine.submit(prompt, LONG) for token in delta.tokens]


async def moved_about(engine: Engine, seed: int) -> list[list[int]]:
    """The answers to all prompts, while experts move all the time."""
    rng = random.Random(seed)
    answers = asyncio.gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))
    while not answers.done():
        assert engine.experts.placement is not None
        await engine.experts.move_to(somewhere_else(rng, engine.experts.placement))
    return await answers


@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": 2, "redundant_experts": 0},
        {"ranks": 3, "redundant_experts": 3, "depth": 2, "max_step_tokens": 32, "max_running": 3},
        {"ranks": 4, "redundant_experts": 8, "weights": "int8"},
        {"ranks": 2, "redundant_experts": 32, "weights": "int4", "depth": 2},
        {"ranks": 3, "redundant_experts": 8, "dtype": "float32", "depth": 2},
    ],
    ids=["2 ranks", "3 uneven ranks, plans ahead", "4 ranks, int8", "2 ranks with all experts, int4", "3 on torch"],
)
async def test_greedy_text_is_that_of_one_rank_while_experts_move(settings: dict[str, Any]) -> None:
    expected = await asyncio.to_thread(one_rank_says, settings)
    engine = await Engine.start(EngineConfig(**settings, rebalance=0))
    try:
        for seed in range(2):
            assert await moved_about(engine, seed) == expected
        report = await engine.experts.report()
        assert report is not None
        assert report.moved.portions >= 8, "between many steps"
        assert report.moved.dropped == 0
    finally:
        await engine.close()


def test_redundant_experts_alone_change_no_text() -> None:
    kind = {"weights": "bf16"}
    prompts = PROMPTS[:4]
    settings = {"ranks": 4, "redundant_experts": 5}
    assert texts(settings, prompts) == texts(kind, prompts)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_tokens_are_counted_once_whatever_the_number_of_ranks(ranks: int) -> None:
    engine = await Engine.start(EngineConfig(ranks=ranks))
    try:
        before = await engine.experts.report()
        await tokens_of(engine, [5, 6, 7])
        now = await engine.experts.report()
    finally:
        await engine.close()
    assert before is not None
    assert now is not None
    assert SPEC.moe is not None
    for old, new in zip(before.layers, now.layers, strict=True):
        # the last token that is made is never computed with
        assert sum(new.tokens) - sum(old.tokens) == (3 + LONG.max_tokens - 1) * SPEC.moe.top_k
    assert sum(now.layers[0].received) - sum(before.layers[0].received) == (
        0 if ranks == 1 else (3 + LONG.max_tokens - 1) * SPEC.moe.top_k
    )


@pytest_asyncio.fixture
async def pair(demo: Path) -> AsyncIterator[Engine]:
    """Two ranks on a folder of their own, with a file that can be taken away."""
    (demo / "model.safetensors").unlink()
    (demo / "model.safetensors").write_bytes((DEMO_MODEL / "model.safetensors").read_bytes())
    engine = await Engine.start(EngineConfig(model=str(demo), ranks=2, redundant_experts=4, rebalance=0))
    yield engine
    await engine.close()


def target(engine: Engine, seed: int = 3) -> Placement:
    assert engine.experts.placement is not None
    rng = random.Random(seed)
    load = [[rng.paretovariate(1.1) for _ in range(32)] for _ in range(3)]
    return place(load, n_slots=36, n_groups=4, n_nodes=1, n_ranks=2)


async def test_experts_of_a_unit_that_sleeps_move_at_once(pair: Engine) -> None:
    await tokens_of(pair, [5, 6])
    goal = target(pair)
    assert await asyncio.wait_for(pair.experts.move_to(goal), 10) > 0
    assert pair.experts.placement == goal
    assert await moved_about(pair, 1) == await asyncio.to_thread(one_rank_says, {})


@pytest.mark.parametrize("how", ["gone", "truncated"])
async def test_a_checkpoint_that_cannot_be_read_any_more_stops_moves_and_nothing_else(
    pair: Engine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(pair.config.model) / "model.safetensors"
    before, old = pair.experts.placement, pids(pair)
    if how == "gone":
        file.unlink()
    else:
        os.truncate(file, 5000)
    assert await asyncio.wait_for(pair.experts.move_to(target(pair)), 10) == 0
    assert pair.experts.placement == before
    assert str(file) in caplog.text
    answers = await asyncio.gather(*(tokens_of(pair, prompt) for prompt in PROMPTS))
    assert answers == await asyncio.to_thread(one_rank_says, {})
    assert pids(pair) == old


async def test_a_rank_that_is_lost_while_experts_move_comes_back_with_those_that_hold(pair: Engine) -> None:
    """Killed at many moments of a move; what survivors and the new rank hold must fit, or text changes."""
    expected = await asyncio.to_thread(one_rank_says, {})
    rng = random.Random(2)
    for turn in range(4):
        moving = asyncio.create_task(pair.experts.move_to(target(pair, seed=10 + turn)))
        await asyncio.sleep(rng.choice((0.0, 0.02, 0.1, 0.2)))
        os.kill(pids(pair)[turn % 2], signal.SIGKILL)
        await asyncio.wait_for(moving, 20)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await tokens_of(pair, PROMPTS[-1]) == expected[-1]
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(tokens_of(pair, prompt) for prompt in PROMPTS))
        assert answers == expected


async def test_redundant_experts_of_a_model_without_any_are_refused(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": config["num_hidden_layers"]}))
    with pytest.raises(LoadError, match="redundant_experts is 3, but the model has no routed experts"):
        Engine(EngineConfig(model=str(demo), ranks=2, redundant_experts=3))
