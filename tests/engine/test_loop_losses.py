"""The one loop when other ranks are lost: what was not finished is taken back, no token changes or is told twice."""

import random
from collections import deque
from typing import Any

import pytest

from brigade.comm.channel import ChannelClosed
from brigade.comm.group import PeerLost
from brigade.core.pages import PagePool
from brigade.core.scheduler import Scheduler, StepPlan
from brigade.engine.loop import Loop
from brigade.engine.messages import Abort, Form, Lost, Ping, Pong, Ready, Step, Token, Wake
from brigade.engine.worker import Wrote
from brigade.model.sampling import Choice
from tests.engine.test_loop import FakeWorker, add, both_depths

READY = Ready(16, 4, 64, [], 2)


class FakeGroup:
    """The others have nothing to do; they are lost at given calls, counted from 1."""

    rank, size = 0, 1

    def __init__(self, losses: set[int]) -> None:
        self.losses, self.n_calls = losses, 0

    def share(self, ints: Any) -> list[tuple[int, ...]]:
        self.n_calls += 1
        if self.n_calls in self.losses:
            raise PeerLost([1], "was killed")
        return [tuple(ints)]

    def close(self) -> None: ...


class FakeMembership:
    """Forms at once, but not those generations whose number is in `failing`."""

    one_wire = False

    def __init__(self, group: FakeGroup, failing: set[int]) -> None:
        self.group, self.failing, self.generation = group, failing, 1

    def form(self, form: Form) -> Ready:
        self.generation = form.generation
        if form.generation in self.failing:
            raise PeerLost([2], "was killed, too")
        return READY


class LosingWorker(FakeWorker):
    """Others are lost in the middle of given steps, counted from 1 with those that are run again."""

    def __init__(self, losses: set[int]) -> None:
        super().__init__({})
        self.losses, self.n_runs = losses, 0

    def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
        self.n_runs += 1
        if self.n_runs in self.losses:
            raise PeerLost([1], "was killed")
        return super().run(plan)


class FakeSupervisor:
    """Gives out messages at set turns. Whenever the loop waits and has said Lost, it hears `waiting`, then Form."""

    def __init__(self, at: dict[int, list[Any]], waiting: list[Any]) -> None:
        self.at, self.turn, self.waiting, self.sent = at, -1, waiting, deque[Any]()
        self.generation, self.n_lost = 1, 0

    def poll(self, timeout: float | None) -> list[Any]:
        self.turn += 1
        assert self.turn < 500, "the loop does not come to rest"
        n_lost = sum(isinstance(m, Lost) for m in self.sent)
        if n_lost > self.n_lost:
            assert timeout is None, "it waits for Form"
            self.n_lost, self.generation = n_lost, self.generation + 1
            waiting, self.waiting = self.waiting, []
            return [*waiting, Form(self.generation)]
        if timeout is None:
            if not self.at:
                raise ChannelClosed("the end")
            self.turn = max(self.turn, min(self.at))
        due = sorted(turn for turn in self.at if turn <= self.turn)
        return [message for turn in due for message in self.at.pop(turn)]

    def send(self, *messages: Any) -> None:
        self.sent.extend(messages)


class Run:
    """A loop that has run until everything was done."""

    def __init__(
        self,
        at: dict[int, list[Any]],
        depth: int,
        in_share: set[int] | None = None,
        in_run: set[int] | None = None,
        failing: set[int] | None = None,
        waiting: list[Any] | None = None,
        max_step_tokens: int = 16,
        drafts: int = 0,
    ) -> None:
        self.worker, self.channel = LosingWorker(in_run or set()), FakeSupervisor(dict(at), waiting or [])
        limits = {"max_step_tokens": max_step_tokens, "max_running": 8}
        self.scheduler = Scheduler(PagePool(16, 4), **limits, drafts=drafts)
        membership = FakeMembership(FakeGroup(in_share or set()), failing or set())
        self.loop = Loop(self.worker, self.scheduler, self.channel, depth, membership)  # type: ignore[arg-type]
        self.loop.run()
        self.sent = list(self.channel.sent)

    def tokens(self, rid: int) -> list[Token]:
        return [t for m in self.sent if isinstance(m, Step) for t in m.tokens if t.rid == rid]

    def check_nothing_is_left(self) -> None:
        s = self.scheduler
        assert s.pool.n_free == s.pool.n_pages
        assert not s.live
        assert not self.worker.n_new
        assert not self.loop.pending


@both_depths
@pytest.mark.parametrize("when", range(1, 8))
@pytest.mark.parametrize("where", ["in_share", "in_run"])
def test_a_loss_at_any_moment_changes_no_token_and_tells_none_twice(depth: int, when: int, where: str) -> None:
    run = Run(
        {0: [add(1, n_prompt=9, max_tokens=4), add(2, max_tokens=3)]}, depth, **{where: {when}}, max_step_tokens=8
    )  # type: ignore[arg-type]
    assert [t.token for t in run.tokens(1)] == [101, 102, 103, 104]
    assert [t.token for t in run.tokens(2)] == [201, 202, 203]
    run.check_nothing_is_left()
    lost = [m for m in run.sent if isinstance(m, Lost)]
    assert lost == [Lost([1], "rank 1: was killed", 1)] * len(lost)
    assert [m for m in run.sent if isinstance(m, Ready)] == [READY] * len(lost)


@both_depths
@pytest.mark.parametrize("seed", range(20))
def test_losses_again_and_again_change_no_token(depth: int, seed: int) -> None:
    rng = random.Random(seed)
    at = {
        rng.randrange(12): [add(rid, n_prompt=rng.randint(1, 20), max_tokens=rng.randint(1, 9))] for rid in (1, 2, 3, 4)
    }
    losses = {"in_share": set(rng.sample(range(1, 40), 5)), "in_run": set(rng.sample(range(1, 40), 5))}
    few_or_many = rng.choice((8, 11, 64))
    run = Run(at, depth, **losses, failing={3, 4}, max_step_tokens=few_or_many, drafts=seed % 2)
    for messages in at.values():
        for m in messages:
            assert [t.token for t in run.tokens(m.rid)] == [100 * m.rid + n for n in range(1, m.params.max_tokens + 1)]
    run.check_nothing_is_left()


@both_depths
def test_messages_are_taken_while_the_unit_is_not_whole(depth: int) -> None:
    waiting = [Ping(7), Abort(1), add(3, max_tokens=2), Wake(9)]
    run = Run({0: [add(1, max_tokens=9), add(2, max_tokens=4)]}, depth, in_run={3}, waiting=waiting)
    kinds = [type(m).__name__ for m in run.sent]
    assert kinds.index("Lost") < kinds.index("Pong") < kinds.index("Ready")
    assert isinstance(run.sent[kinds.index("Pong")], Pong)
    assert len(run.tokens(1)) < 9
    assert len(run.tokens(2)) == 4
    assert len(run.tokens(3)) == 2
    run.check_nothing_is_left()


@both_depths
def test_a_rank_that_sleeps_comes_to_form_and_sleeps_again(depth: int) -> None:
    run = Run({0: [add(1, max_tokens=2)], 50: [Form(2)], 60: [add(2, max_tokens=2)]}, depth)
    assert [type(m) for m in run.sent if not isinstance(m, Step)] == [Ready]
    assert len(run.tokens(2)) == 2
    run.check_nothing_is_left()


@both_depths
def test_form_in_the_middle_of_work_is_a_loss_that_was_not_noticed(depth: int) -> None:
    run = Run({0: [add(1, n_prompt=9, max_tokens=6)], 3: [Form(2)]}, depth, max_step_tokens=8)
    assert [t.token for t in run.tokens(1)] == [101, 102, 103, 104, 105, 106]
    run.check_nothing_is_left()


def test_a_step_behind_one_that_was_given_up_is_not_run() -> None:
    run = Run({0: [add(1, max_tokens=6)]}, 3, in_run={3})
    starts = [plan.slices[0].start for plan in run.worker.ran if plan]
    assert starts == sorted(set(starts)), "each position was run once, in order"


@both_depths
def test_a_worker_that_fails_while_others_are_lost_ends_the_loop(depth: int) -> None:
    class Broken(LosingWorker):
        def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
            raise RuntimeError("out of memory")

    channel = FakeSupervisor({0: [add(1, max_tokens=2)]}, [])
    membership = FakeMembership(FakeGroup({2}), set())
    scheduler = Scheduler(PagePool(4, 4), max_step_tokens=8, max_running=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        Loop(Broken(set()), scheduler, channel, depth, membership).run()  # type: ignore[arg-type]
