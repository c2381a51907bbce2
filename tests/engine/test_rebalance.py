"""The engine's side of moving experts, over ranks made of messages: who is asked, what holds, what a loss leaves."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from brigade.core.moves import moves
from brigade.core.placement import Placement, busiest_over_mean, place
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.messages import Loads, Portion, Settled, Staged, TellLoads
from brigade.engine.output import Unavailable
from brigade.engine.rebalance import Rebalancer
from brigade.spec.config import read_spec

SPEC = read_spec(DEMO_MODEL)
assert SPEC.moe is not None
E, L = SPEC.moe.n_experts, SPEC.n_layers - SPEC.n_dense
RANKS = 3


class Ranks:
    """What the ranks of a unit would say, as a script: `loads` [layer][expert] of each rank, `on_portion` for moves."""

    def __init__(self, rebalancer: Rebalancer) -> None:
        self.to = rebalancer
        self.loads = [[[0] * E for _ in range(L)] for _ in range(RANKS)]
        self.portions: list[Portion] = []
        self.n_wakes = 0
        self.silent = False
        self.on_portion: Callable[[Portion], None] = self.make
        rebalancer.up(self.hear, self.wake)

    def hear(self, rank: int, message: Any) -> None:
        if self.silent:
            return
        if isinstance(message, TellLoads):
            seen, self.loads[rank] = self.loads[rank], [[0] * E for _ in range(L)]
            asyncio.get_running_loop().call_soon(self.to.take, rank, Loads(message.seq, seen, [sum(x) for x in seen]))
        elif isinstance(message, Portion) and rank == RANKS - 1:
            self.portions.append(message)
            asyncio.get_running_loop().call_soon(self.on_portion, message)

    def wake(self) -> None:
        self.n_wakes += 1

    def make(self, portion: Portion) -> None:
        for rank in range(RANKS):
            self.to.take(rank, Staged(portion.number))
        for rank in range(RANKS):
            self.to.take(rank, Settled(portion.number, True))


def skewed(seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[int(40 * rng.paretovariate(1.2)) for _ in range(E)] for _ in range(L)]


def made(**settings: Any) -> Rebalancer:
    return Rebalancer(EngineConfig(ranks=RANKS, redundant_experts=4, **settings), SPEC)


def elsewhere(now: Placement, seed: int = 5) -> Placement:
    return place(skewed(seed), n_slots=now.n_slots, n_groups=4, n_nodes=1, n_ranks=RANKS)


async def test_a_look_evens_the_loads_that_all_ranks_told() -> None:
    r = made()
    ranks = Ranks(r)
    load = skewed()
    ranks.loads = [load] * RANKS
    before = r.placement
    assert before is not None
    assert await r.look() == sum(len(p.moves) for p in ranks.portions) > 0
    assert r.placement is not None
    assert max(busiest_over_mean(load, r.placement)) < max(busiest_over_mean(load, before))
    assert r.portion == ranks.portions[-1].number
    assert ranks.n_wakes == len(ranks.portions), "ranks that sleep must meet to agree"
    assert await r.look() == 0, "nothing new was counted"


async def test_few_tokens_are_no_reason_to_move() -> None:
    r = made()
    ranks = Ranks(r)
    ranks.loads[0][0][3] = 40
    assert await r.look() == 0
    assert ranks.portions == []


async def test_the_report_tells_before_and_after() -> None:
    r = made()
    ranks = Ranks(r)
    ranks.loads = [skewed()] * RANKS
    await r.look()
    ranks.loads[1] = [[1] + [0] * (E - 1) for _ in range(L)]
    report = await r.report()
    assert report is not None
    assert report.busiest_over_mean < report.busiest_over_mean_before
    assert [x.layer for x in report.layers] == list(range(SPEC.n_dense, SPEC.n_layers))
    assert report.layers[0].tokens[0] == RANKS * skewed()[0][0] + 1
    assert report.layers[0].received == [0, 1, 0], "since the last move"
    assert sorted(set(report.layers[0].slots)) == list(range(E))
    assert report.moved.experts == sum(len(p.moves) for p in ranks.portions)
    assert report.moved.last is not None


async def test_a_portion_that_a_rank_cannot_read_ends_the_moving_and_names_the_file(
    caplog: pytest.LogCaptureFixture,
) -> None:
    r = made()
    ranks = Ranks(r)
    before = r.placement

    def refuse(portion: Portion) -> None:
        for rank in range(RANKS):
            r.take(rank, Staged(portion.number, "model.safetensors: is gone" if rank == 1 else ""))
        for rank in range(RANKS):
            r.take(rank, Settled(portion.number, False))

    ranks.on_portion = refuse
    assert before is not None
    assert await r.move_to(elsewhere(before)) == 0
    assert (r.placement, r.portion, len(ranks.portions)) == (before, 0, 1)
    assert "rank 1 cannot move experts: model.safetensors: is gone" in caplog.text
    report = await r.report()
    assert report is not None
    assert report.moved.dropped == 1


class TestALossWhileExpertsMove:
    async def lose(self, settled: list[int]) -> tuple[Rebalancer, Placement, Portion]:
        """The unit is lost when these ranks have said that they made the portion."""
        r = made()
        ranks = Ranks(r)
        before = r.placement
        assert before is not None

        def half(portion: Portion) -> None:
            for rank in range(RANKS):
                r.take(rank, Staged(portion.number))
            for rank in settled:
                r.take(rank, Settled(portion.number, True))
            r.where()

        ranks.on_portion = half
        moved = await asyncio.wait_for(r.move_to(elsewhere(before)), 5)
        assert (moved > 0) == bool(settled)
        return r, before, ranks.portions[0]

    async def test_what_nobody_said_to_have_made_does_not_hold(self) -> None:
        r, before, portion = await self.lose([])
        assert r.where() == (before, 0)
        r.take(0, Settled(portion.number, True))
        assert r.where() == (before, 0), "too late: new ranks have been started with the old placement"

    async def test_what_one_rank_said_to_have_made_holds(self) -> None:
        r, before, portion = await self.lose([2])
        placement, number = r.where()
        assert number == portion.number
        assert placement is not None
        assert tuple(moves(before, placement)) == portion.moves

    async def test_nothing_is_asked_until_a_unit_is_up_again(self) -> None:
        r, _, _ = await self.lose([])
        with pytest.raises(Unavailable):
            await r.report()
        ranks = Ranks(r)
        assert await r.report() is not None
        assert r.placement is not None
        assert await r.move_to(elsewhere(r.placement)) > 0
        assert ranks.portions[0].number > 1, "a number is never used for two portions"

    async def test_who_waits_for_loads_is_told(self) -> None:
        r = made()
        Ranks(r).silent = True
        asking = asyncio.create_task(r.report())
        await asyncio.sleep(0)
        r.lost()
        with pytest.raises(Unavailable, match="lost"):
            await asyncio.wait_for(asking, 5)


async def test_where_nothing_can_move_there_is_nothing_to_run() -> None:
    for config in (EngineConfig(), EngineConfig(ranks=2, rebalance=0)):
        await asyncio.wait_for(Rebalancer(config, SPEC).run(), 5)


async def test_loads_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="layers and experts"):
        made().take(0, Loads(1, [[1, 2]], [3]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"redundant_experts": 2}, "redundant_experts are copies on other ranks, but ranks is 1"),
        ({"ranks": 2, "redundant_experts": -1}, "redundant_experts must be between 0"),
        ({"ranks": 2, "rebalance": -1}, "rebalance must be between 0"),
        ({"ranks": 2, "rebalance": "often"}, "rebalance must be a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)
