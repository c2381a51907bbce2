"""The one loop with a made-up worker and a made-up channel: what is said, in which order, and what is left behind."""

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from brigade.comm.channel import ChannelClosed
from brigade.core.pages import PagePool
from brigade.core.scheduler import Scheduler, Slice, StepPlan
from brigade.engine.loop import Loop
from brigade.engine.messages import Abort, Add, Logprob, Ping, Pong, Refused, Stats, Step, Token
from brigade.engine.worker import Wrote
from brigade.model.sampling import BROKEN, Choice
from brigade.spec.sampling import SamplingParams

EOS = 7


class FakeWorker:
    """Its n-th new token for request r is 100 r + n, unless `script` says otherwise. Of its guesses, every other one is
    right."""

    def __init__(self, script: dict[tuple[int, int], int]) -> None:
        self.spec = SimpleNamespace(eos_ids=(EOS,))
        self.script = script
        self.mover = None
        self.n_new: dict[int, int] = {}
        self.ran: list[StepPlan] = []

    def add(self, rid: int, prompt: list[int], params: SamplingParams) -> None:
        assert rid not in self.n_new
        self.n_new[rid] = 0

    def forget(self, rid: int) -> None:
        del self.n_new[rid]

    def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
        self.ran.append(plan)
        assert {s.rid for s in plan.slices} <= set(self.n_new), "a step has a request that the worker does not know"
        return {s.rid: self.choices(s) for s in plan.slices if s.sample}

    def choices(self, s: Slice) -> list[Choice]:
        out = []
        for _ in range(1 + (s.n_drafts and self.n_new[s.rid] % 2)):
            n = self.n_new[s.rid] = self.n_new[s.rid] + 1
            token = self.script.get((s.rid, n), 100 * s.rid + n)
            out.append(Choice(token, -0.5, ((token, -0.5),)))
        return out


class FakeChannel:
    """Gives out messages at set turns; is closed once everything is told and the loop would sleep."""

    def __init__(self, at: dict[int, list[Any]]) -> None:
        self.at, self.turn, self.sent = at, -1, deque[Any]()

    def poll(self, timeout: float | None) -> list[Any]:
        self.turn += 1
        assert self.turn < 500, "the loop does not come to rest"
        if timeout is None:
            if not self.at:
                raise ChannelClosed("the end")
            self.turn = max(self.turn, min(self.at))
        return self.at.pop(self.turn, [])

    def send(self, *messages: Any) -> None:
        self.sent.extend(messages)


class Run:
    """A loop that has run until everything was done."""

    def __init__(
        self,
        at: dict[int, list[Any]],
        depth: int,
        script: dict[tuple[int, int], int] | None = None,
        n_pages: int = 16,
        max_running: int = 8,
        max_step_tokens: int = 16,
        drafts: int = 0,
    ) -> None:
        self.worker, self.channel = FakeWorker(script or {}), FakeChannel(dict(at))
        limits = {"max_step_tokens": max_step_tokens, "max_running": max_running}
        self.scheduler = Scheduler(PagePool(n_pages, 4), **limits, drafts=drafts)
        self.loop = Loop(self.worker, self.scheduler, self.channel, depth)  # type: ignore[arg-type]
        self.loop.run()
        self.sent = list(self.channel.sent)

    def tokens(self, rid: int) -> list[Token]:
        return [t for m in self.sent if isinstance(m, Step) for t in m.tokens if t.rid == rid]

    def nothing_is_left(self) -> bool:
        s = self.scheduler
        return (
            s.pool.n_free == s.pool.n_pages
            and not (s.live or s.running or s.waiting)
            and not self.worker.n_new
            and not self.loop.pending
        )


def add(rid: int, n_prompt: int = 3, **params: Any) -> Add:
    return Add(rid, list(range(1000 * rid, 1000 * rid + n_prompt)), SamplingParams(**params))


both_depths = pytest.mark.parametrize("depth", [1, 2, 3])


@both_depths
def test_tokens_come_in_order_and_the_last_one_says_why_it_ended(depth: int) -> None:
    run = Run({0: [add(1, max_tokens=3), add(2, max_tokens=2)]}, depth)
    assert [(t.token, t.finish) for t in run.tokens(1)] == [(101, ""), (102, ""), (103, "length")]
    assert [(t.token, t.finish) for t in run.tokens(2)] == [(201, ""), (202, "length")]
    assert run.tokens(1)[0] == Token(1, 101, "", -0.5, [Logprob(101, -0.5)], 0)
    assert run.nothing_is_left()


@both_depths
def test_end_of_sequence_stop_tokens_and_ignoring_them(depth: int) -> None:
    script = {(rid, 2): EOS for rid in (1, 2)} | {(3, 2): 9}
    run = Run(
        {0: [add(1, max_tokens=4), add(2, max_tokens=4, ignore_eos=True), add(3, max_tokens=4, stop_token_ids=(9,))]},
        depth,
        script,
    )
    assert [t.finish for t in run.tokens(1)] == ["", "stop"]
    assert [t.finish for t in run.tokens(2)] == ["", "", "", "length"]
    assert [t.finish for t in run.tokens(3)] == ["", "stop"]
    assert run.nothing_is_left()


def test_a_step_that_gives_several_tokens_tells_them_as_one_at_a_time_would() -> None:
    at = {0: [add(rid, max_tokens=8, stop_token_ids=(9,)) for rid in (1, 2, 3, 4)]}
    script = {(2, 4): 9, (3, 5): 9, (4, 3): EOS}
    want, got = Run(at, 1, script), Run(at, 1, script, drafts=1)
    for rid in (1, 2, 3, 4):
        assert got.tokens(rid) == want.tokens(rid)
        assert [t.finish for t in got.tokens(rid)][-1] == ("length" if rid == 1 else "stop")
    assert len(got.worker.ran) < len(want.worker.ran)
    stats = [m for m in got.sent if isinstance(m, Step)][-1].stats
    assert (stats.n_drafted, stats.n_accepted) == (got.scheduler.n_drafted, got.scheduler.n_accepted)
    assert 0 < stats.n_accepted < stats.n_drafted
    assert got.nothing_is_left()


@both_depths
def test_steps_are_counted_and_each_is_told_once(depth: int) -> None:
    run = Run({0: [add(1, max_tokens=4)]}, depth)
    steps = [m for m in run.sent if isinstance(m, Step)]
    assert [m.stats.n_steps for m in steps] == list(range(1, len(run.worker.ran) + 1))
    assert steps[0].stats.running == 1
    assert steps[0].stats.pages_used > 0
    assert (steps[-1].stats.running, steps[-1].stats.pages_used) == (0, 0)


@both_depths
@pytest.mark.parametrize("when", range(6))
def test_aborting_at_any_moment_gives_everything_back(depth: int, when: int) -> None:
    run = Run({0: [add(1, max_tokens=50), add(2, max_tokens=5)], when: [Abort(1)]} if when else {}, depth)
    if not when:
        run = Run({0: [add(1, max_tokens=50), add(2, max_tokens=5), Abort(1)]}, depth)
        assert run.tokens(1) == []
    assert len(run.tokens(1)) <= when
    assert all(not t.finish for t in run.tokens(1))
    assert [t.token for t in run.tokens(2)] == [201, 202, 203, 204, 205]
    assert run.nothing_is_left()


@both_depths
def test_aborting_what_waits_and_what_is_unknown(depth: int) -> None:
    at = {0: [add(1, max_tokens=6), add(2, max_tokens=6), Abort(99)], 2: [Abort(2), Abort(2)], 30: [Abort(1)]}
    run = Run(at, depth, max_running=1)
    assert run.tokens(2) == []
    assert len(run.tokens(1)) == 6
    assert run.nothing_is_left()


@both_depths
@pytest.mark.parametrize("n", [1, 2, 4])
def test_broken_logits_end_only_their_own_request(depth: int, n: int) -> None:
    run = Run({0: [add(1, max_tokens=4), add(2, max_tokens=4)]}, depth, {(1, n): BROKEN})
    assert [t.finish for t in run.tokens(1)] == [""] * (n - 1) + ["error"]
    assert [t.token for t in run.tokens(2)] == [201, 202, 203, 204]
    assert all(t.token >= 0 for m in run.sent if isinstance(m, Step) for t in m.tokens)
    assert run.nothing_is_left()


@both_depths
def test_logits_of_an_aborted_request_that_turn_out_broken_are_not_told(depth: int) -> None:
    run = Run({0: [add(1, max_tokens=9)], 2: [Abort(1)]}, depth, {(1, n): BROKEN for n in range(2, 9)})
    assert "error" not in [t.finish for t in run.tokens(1)][:1]
    assert run.nothing_is_left()


@both_depths
def test_a_request_that_can_never_fit_is_refused_and_others_go_on(depth: int) -> None:
    run = Run({0: [add(1, n_prompt=60, max_tokens=9), add(2, max_tokens=2)]}, depth, n_pages=16)
    refused = [m for m in run.sent if isinstance(m, Refused)]
    assert [m.rid for m in refused] == [1]
    assert "pages" in refused[0].message
    assert run.tokens(1) == []
    assert len(run.tokens(2)) == 2
    assert run.nothing_is_left()


@both_depths
def test_the_largest_request_that_fits_is_served_alone(depth: int) -> None:
    run = Run({0: [add(1, n_prompt=60, max_tokens=5), add(2, max_tokens=2)]}, depth, n_pages=16)
    assert len(run.tokens(1)) == 5
    assert len(run.tokens(2)) == 2
    assert run.nothing_is_left()


@both_depths
def test_an_idle_loop_answers_a_ping(depth: int) -> None:
    (pong,) = Run({0: [Ping(5)]}, depth).sent
    assert pong == Pong(5, Stats(0, 0, 0, 0, 0), pong.clock)
    assert pong.clock <= time.monotonic_ns() < pong.clock + 60e9


@both_depths
def test_a_busy_loop_answers_a_ping_between_two_steps(depth: int) -> None:
    run = Run({0: [add(1, max_tokens=8)], 3: [Ping(1)]}, depth)
    kinds = [type(m).__name__ for m in run.sent]
    assert kinds.count("Pong") == 1
    assert 0 < kinds.index("Pong") < len(kinds) - 1


@both_depths
def test_when_pages_run_out_everything_is_still_told_once(depth: int) -> None:
    at = {0: [add(r, n_prompt=8, max_tokens=20) for r in range(1, 5)]}
    run = Run(at, depth, n_pages=9)
    for rid in range(1, 5):
        assert [t.token for t in run.tokens(rid)] == [100 * rid + n for n in range(1, 21)]
    assert run.scheduler.n_preempted > 0
    assert run.nothing_is_left()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_more_urgent_request_is_run_before_those_that_came_first(depth: int) -> None:
    adds = [Add(rid, [rid], SamplingParams(max_tokens=2, ignore_eos=True), priority=p) for rid, p in ((1, 1), (2, 0))]
    run = Run({0: adds}, depth, max_running=1)
    assert [s.rid for plan in run.worker.ran for s in plan.slices] == [2, 2, 1, 1]


@both_depths
def test_cached_prompt_tokens_are_told(depth: int) -> None:
    again = Add(2, add(1, n_prompt=9).prompt, SamplingParams(max_tokens=2))
    other = Add(3, again.prompt, again.params, "another tenant")
    run = Run({0: [add(1, n_prompt=9, max_tokens=2)], 20: [again, other]}, depth)
    assert [t.n_cached for t in run.tokens(2)] == [8, 8]
    assert [t.n_cached for t in run.tokens(3)] == [0, 0]


@both_depths
def test_a_worker_that_fails_ends_the_loop(depth: int) -> None:
    class Broken(FakeWorker):
        def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
            raise RuntimeError("out of memory")

    channel = FakeChannel({0: [add(1, max_tokens=2)]})
    loop = Loop(Broken({}), Scheduler(PagePool(4, 4), max_step_tokens=8, max_running=2), channel, depth)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run()


@pytest.mark.parametrize(("asked", "got"), [(1, {1}), (2, {2}), (0, {1, 2})])
def test_steps_run_in_as_many_micro_batches_as_asked_for_or_both_ways_are_tried(asked: int, got: set[int]) -> None:
    class Counting(FakeWorker):
        def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
            ran.add(n)
            return super().run(plan)

    ran: set[int] = set()
    adds = [Add(rid, [1, 2], SamplingParams(max_tokens=60, ignore_eos=True)) for rid in (1, 2)]
    scheduler = Scheduler(PagePool(40, 4), max_step_tokens=8, max_running=4)
    channel: Any = FakeChannel({0: adds})
    Loop(Counting({}), scheduler, channel, 1, micro_batches=asked).run()  # type: ignore[arg-type]
    assert ran == got
