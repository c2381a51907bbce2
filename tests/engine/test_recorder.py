"""What is recorded: a rank's portions, whose clock is how far ahead, who has not told."""

import asyncio
import itertools
import time
from typing import Any

import pytest

from brigade import SamplingParams
from brigade.core.laps import Laps
from brigade.core.scheduler import Slice, StepPlan
from brigade.engine import recorded, recorder
from brigade.engine.client import Engine
from brigade.engine.messages import Ping, Pong, Ran, Record, Spans, Stats, TellSpans
from brigade.engine.recorded import Recorded
from brigade.engine.recorder import Recorder

PLAN = StepPlan((Slice(7, (1, 2, 3), 0, (0,), True), Slice(9, (4,), 20, (1, 2), True)))


class Ranks:
    """Two of them; what they are sent is kept, and answered if `answer` is on."""

    def __init__(self) -> None:
        self.recorder = Recorder(2, self.take)
        self.sent: list[tuple[int, Any]] = []
        self.silent: set[int] = set()
        self.whole = True
        self.ahead = [0, 0]
        self.nap = 0.0

    def take(self, rank: int, message: Any) -> bool:
        self.sent.append((rank, message))
        if rank in self.silent or not self.whole:
            return self.whole
        if isinstance(message, TellSpans):
            self.recorder.hear(rank, Spans(message.seq, [Ran(1, 2, 1, [])], [], []))
            self.recorder.hear(rank, Spans(message.seq, [Ran(3, 4, 1, [])], [], [], 5, last=True))
        if isinstance(message, Ping):
            clock = time.monotonic_ns() + self.ahead[rank]
            time.sleep(self.nap)
            self.recorder.hear(rank, Pong(message.seq, Stats(0, 0, 0, 0, 0), clock))
        return True


async def test_all_ranks_are_told_to_record_and_their_portions_are_joined() -> None:
    ranks = Ranks()
    ranks.recorder.start(2.5, 99)
    assert ranks.sent == [(0, Record(2.5, 99)), (1, Record(2.5, 99))]
    told = await ranks.recorder.collect()
    assert [[s.begin for s in one.steps] for one in told] == [[1, 3], [1, 3]]
    assert [one.n_lost for one in told] == [5, 5]


async def test_a_rank_that_does_not_tell_is_named_and_the_others_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "ANSWER_DEADLINE", 0.05)
    ranks = Ranks()
    ranks.silent = {1}
    told = await ranks.recorder.collect()
    assert (told[0].problem, len(told[0].steps)) == ("", 2)
    assert "within 0.05 s" in told[1].problem
    ranks.recorder.hear(1, Spans(1, [], [], [], last=True))
    assert len((await asyncio.wait_for(ranks.recorder.collect(), 1))[0].steps) == 2, "what comes late is for nobody"


async def test_ranks_of_a_unit_that_is_not_whole_are_not_waited_for() -> None:
    ranks = Ranks()
    ranks.whole = False
    told = await asyncio.wait_for(ranks.recorder.collect(), 1)
    assert ["not whole" in one.problem for one in told] == [True, True]


async def test_clocks_that_differ_by_less_than_a_way_there_and_back_count_as_the_same() -> None:
    ranks = Ranks()
    ranks.ahead = [0, 10**12]
    for ranks.nap in (0.02, 0.001):
        ranks.recorder.ask_clocks()
    told = await ranks.recorder.collect()
    assert told[0].offset == 0
    assert abs(told[1].offset - 10**12) <= told[1].uncertain < 10**7, "the shortest way counts"


def test_a_rank_tells_its_steps_in_portions_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "PORTION", 2)
    of = Recorded(Laps(time.monotonic_ns))
    of.ran(time.monotonic(), PLAN, 1)
    of.record(10, 99)
    for _ in range(3):
        of.turn()
        of.parts.end("attention", 0)
        of.turns.end("commit")
        of.ran(time.monotonic(), PLAN, 2)
    portions = list(of.tell(4))
    assert [len(p.steps) for p in portions] == [2, 1, 0]
    assert [p.last for p in portions] == [False, False, True]
    assert {p.seq for p in portions} == {4}
    assert portions[0].steps[0].slices == [(7, 0, 3), (9, 20, 1)]
    assert [len(p.steps) for p in of.tell(5)] == [0]


def test_a_rank_that_nobody_tells_to_stop_stops_by_itself() -> None:
    of = Recorded(Laps(time.monotonic_ns))
    of.record(0.0, 99)
    time.sleep(0.001)
    of.turn()
    assert not of.on
    assert not of.parts.on


@pytest.mark.asyncio(loop_scope="session")
async def test_each_layer_of_each_step_of_a_real_rank_is_there_and_lies_within_its_step(engine: Engine) -> None:
    engine.recorder.start(10, 9999)
    generation = await engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    engine.recorder.ask_clocks()
    assert len([token async for delta in generation for token in delta.tokens]) == 4
    (rank,) = await engine.recorder.collect()
    assert (rank.problem, rank.n_lost, rank.offset) == ("", 0, 0)
    mine = [step for step in rank.steps if any(rid == generation.rid for rid, _, _ in step.slices)]
    assert [n for step in mine for rid, _, n in step.slices if rid == generation.rid][:4] == [3, 1, 1, 1]
    for step in mine:
        parts = [p for p in rank.parts if step.begin <= p[1] and p[2] <= step.end]
        assert [p[0] for p in parts][:2] == ["batch", "embedding"]
        assert [p[0] for p in parts][-2:] == ["head", "sampling"]
        assert sorted({layer for _, _, _, layer, _ in parts}) == [-1, *range(engine.spec.n_layers)]
        assert all(a[2] == b[1] for a, b in itertools.pairwise(parts)), "no time between two parts"
    assert {name for name, *_ in rank.turns} == {"schedule", "agree", "commit"}
