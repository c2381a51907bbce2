"""A rank's side of hand-overs: what it is told twice, late or never leaves no page behind."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from brigade.comm.kv.link import Failed, Fetches, GoOn
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.offers import Offers, Withdrawn
from brigade.comm.kv.rows import Bytes, Piece, Rows, copy_checked
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, Slice, StepPlan
from brigade.engine import handing
from brigade.engine.handing import Handing
from brigade.engine.loop import Loop
from brigade.engine.messages import (
    Abort,
    Add,
    Adopt,
    Adopted,
    Computed,
    Follow,
    Gone,
    Offered,
    Refused,
    Reserve,
    Reserved,
    Token,
)
from brigade.engine.worker import Wrote
from brigade.model.sampling import Choice
from brigade.spec.sampling import SamplingParams

PAGE, N_PAGES, ROW, EOS = 2, 8, 16, 7
PARAMS = SamplingParams(max_tokens=4)


def rows(seed: int) -> Rows:
    return Rows(np.random.default_rng(seed).integers(0, 256, 2 * N_PAGES * PAGE * ROW, np.uint8), 2, PAGE, ROW)


class Side:
    """One rank's Handing, what it has sent, and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, open_source: Callable[..., Any] | None = None) -> None:
        self.sent = deque[Any]()
        self.rows = rows(3)
        self.scheduler = Scheduler(PagePool(N_PAGES, PAGE), max_step_tokens=16, max_running=4)
        worker: Any = SimpleNamespace(spec=SimpleNamespace(eos_ids=(EOS,)))
        channel: Any = SimpleNamespace(send=self.sent.append)
        self.offers = Offers(self.rows)
        fetches = Fetches(self.rows, open_source, 5) if open_source else None
        self.handing = Handing(worker, self.scheduler, channel, None if fetches else self.offers, fetches)
        self.skipped = 0.0
        clock = time.monotonic
        times = {"monotonic": lambda: clock() + self.skipped, "monotonic_ns": time.monotonic_ns}
        monkeypatch.setattr(handing, "time", SimpleNamespace(**times))

    def turns(self, kind: type[Any]) -> list[Any]:
        """Go round until something of this kind was sent; what has begun to run meanwhile."""
        begun, until = [], time.monotonic() + 5
        while not any(isinstance(m, kind) for m in self.sent):
            assert time.monotonic() < until
            begun += self.handing.turn()
            time.sleep(0.001)
        return begun

    @property
    def n_held(self) -> int:
        return N_PAGES - self.scheduler.pool.n_free


class Memory:
    """Another rank's cache in this process, whose prompt is finished piece by piece."""

    def __init__(self, n: int) -> None:
        self.rows, self.n = rows(1), n
        self.pages = list(range(-(-n // PAGE)))
        self.offers = Offers(self.rows)
        self.offer = self.offers.offer(50, 0, n)
        self.stalled = threading.Event()

    def open(self, offer: Offer, have: Sequence[int]) -> AbstractContextManager["Memory"]:
        if offer.rid != 50:
            raise Failed("there is no such request")
        self.have = list(have)
        return nullcontext(self)

    def next(self, go_on: GoOn) -> Piece:
        while self.stalled.is_set() or (found := self.offers.next(50, self.have, 0.005)) is None:
            go_on()
        piece, self.make_check = found
        self.have[piece.layer] = piece.end
        return piece

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        return copy_checked(piece.runs(self.rows), runs)

    def check(self, go_on: GoOn) -> int | None:
        return self.make_check()


@pytest.fixture
def memory() -> Memory:
    return Memory(5)


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Iterator[Side]:
    side = Side(monkeypatch, memory.open)
    yield side
    side.handing.close()


def reserve(rid: int, n: int = 5) -> Reserve:
    return Reserve(rid, list(range(100, 100 + n)), n, PARAMS)


def reserved(side: Side) -> None:
    side.handing.take(reserve(1))
    assert side.turns(Reserved) == []
    assert side.sent.popleft() == Reserved(1, 0)


def test_rows_come_before_the_first_token_and_what_is_told_twice_is_done_once(decode: Side, memory: Memory) -> None:
    reserved(decode)
    for _ in range(2):
        decode.handing.take(Follow(1, memory.offer))
    memory.offers.wrote(50, 0, 0, 5, memory.pages)
    until = time.monotonic() + 5
    while not (decode.rows.memory[: 5 * ROW] == memory.rows.memory[: 5 * ROW]).all():
        assert decode.handing.turn() == []
        assert time.monotonic() < until
    memory.offers.complete(50, memory.pages)
    for _ in range(2):
        decode.handing.take(Adopt(1, 9))
    assert decode.turns(Adopted) == [(1, list(range(100, 105)), PARAMS, [9])]
    assert decode.sent[-1].failure == ""
    decode.handing.take(Adopt(1, 9))
    decode.handing.take(Follow(1, memory.offer))
    assert [type(m) for m in decode.sent] == [Adopted, Gone, Gone]
    assert [r.rid for r in decode.scheduler.running] == [1]


def test_pages_are_reserved_for_the_most_urgent_requests_first(decode: Side) -> None:
    for rid, priority in (1, 0), (2, 5), (3, -2), (4, 0):
        decode.handing.take(Reserve(rid, list(range(10 * rid, 10 * rid + 5)), 5, PARAMS, priority=priority))
    decode.handing.turn()
    assert [m.rid for m in decode.sent] == [3, 1], "three pages each, of eight"
    decode.handing.drop(3)
    decode.handing.turn()
    assert [m.rid for m in decode.sent] == [3, 1, 4]


def test_a_request_whose_rows_are_all_here_waits_for_its_first_token_alone(decode: Side, memory: Memory) -> None:
    reserved(decode)
    memory.offers.complete(50, memory.pages)
    decode.handing.take(Follow(1, memory.offer))
    until = time.monotonic() + 5
    while decode.handing._fetches.fetching(1):  # type: ignore[union-attr]
        assert decode.handing.turn() == []
        assert time.monotonic() < until
    decode.handing.take(Follow(1, memory.offer))
    decode.handing.take(Adopt(1, 9))
    assert [rid for rid, *_ in decode.handing.turn()] == [1]
    assert decode.sent[-1].seconds < 1


@pytest.mark.parametrize("adopting", [False, True])
def test_pages_of_a_dropped_request_come_back_when_nothing_is_written_any_more(
    decode: Side, memory: Memory, adopting: bool
) -> None:
    reserved(decode)
    writing, go = threading.Event(), threading.Event()

    def read(piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        writing.set()
        assert go.wait(5)
        return copy_checked(piece.runs(memory.rows), runs)

    memory.read = read  # type: ignore[method-assign]
    memory.offers.complete(50, memory.pages)
    decode.handing.take(Follow(1, memory.offer))
    assert writing.wait(5)
    if adopting:
        decode.handing.take(Adopt(1, 9))
    assert decode.handing.drop(1)
    assert decode.handing.turn() == []
    assert decode.n_held == 3
    assert decode.handing.pages == (3, 0)
    go.set()
    until = time.monotonic() + 5
    while decode.n_held:
        assert decode.handing.turn() == []
        assert time.monotonic() < until
    assert not any(isinstance(m, Adopted) for m in decode.sent)
    assert decode.handing.rests is None


def test_what_cannot_be_fetched_is_computed_here(decode: Side, memory: Memory) -> None:
    reserved(decode)
    decode.handing.take(Follow(1, structs.replace(memory.offer, rid=51)))
    assert decode.handing.turn() == []
    decode.handing.take(Adopt(1, 9))
    assert decode.turns(Adopted) == [(1, list(range(100, 105)), PARAMS, [9])]
    assert decode.sent[-1].failure == "there is no such request"
    assert [s.tokens for s in decode.scheduler.plan().slices] == [(*range(100, 105), 9)]


def test_a_prompt_that_nobody_has_offered_is_computed_here(decode: Side) -> None:
    reserved(decode)
    decode.handing.take(Adopt(1, 9))
    assert decode.turns(Adopted) == [(1, list(range(100, 105)), PARAMS, [9])]
    assert decode.sent[-1].failure == "nobody has offered them"


def test_another_rank_goes_on_where_a_lost_one_has_stopped(decode: Side, memory: Memory) -> None:
    reserved(decode)
    decode.handing.take(Follow(1, structs.replace(memory.offer, rid=51)))
    decode.handing.take(Follow(1, memory.offer))
    memory.offers.complete(50, memory.pages)
    decode.handing.take(Adopt(1, 9))
    assert decode.turns(Adopted)
    assert decode.sent[-1].failure == ""


def test_a_reservation_waits_for_room_and_ends_with_its_deadline(decode: Side) -> None:
    decode.handing.take(reserve(1, 9))
    decode.handing.take(reserve(2, 9))
    decode.turns(Reserved)
    assert [m.rid for m in decode.sent] == [1]
    assert decode.handing.rests is not None
    decode.skipped = handing.RESERVATION + 1
    decode.handing.turn()
    decode.handing.turn()
    assert [m.rid for m in decode.sent] == [1, 2]
    assert decode.handing.drop(2)
    assert decode.n_held == 0
    assert decode.handing.rests is None


def test_so_does_a_transfer_that_nobody_follows_up(decode: Side, memory: Memory) -> None:
    reserved(decode)
    decode.skipped = handing.RESERVATION - 1
    decode.handing.take(Follow(1, memory.offer))
    decode.skipped = handing.RESERVATION + 1
    assert decode.handing.turn() == []
    assert decode.n_held == 3
    decode.skipped = 2 * handing.RESERVATION
    until = time.monotonic() + 5
    while decode.n_held:
        assert decode.handing.turn() == []
        assert time.monotonic() < until
    decode.handing.take(Adopt(1, 9))
    assert decode.sent[-1] == Gone(1)


def test_what_can_never_fit_is_refused(decode: Side) -> None:
    decode.handing.take(reserve(1, 40))
    assert [type(m) for m in decode.sent] == [Refused]


class LateWorker:
    """Each of its steps writes zeros into the pages that it has. The second one, of a request that leaves meanwhile,
    stands still for as long as somebody else could be writing there."""

    mover, spec = None, SimpleNamespace(eos_ids=(EOS,))

    def __init__(self, rows: Rows, written: threading.Event) -> None:
        self.rows, self.written, self.n_ran = rows, written, 0

    def add(self, rid: int, prompt: list[int], params: SamplingParams, new: Sequence[int] = ()) -> None: ...
    def forget(self, rid: int) -> None: ...

    def run(self, plan: StepPlan, n: int, wrote: Wrote | None) -> dict[int, list[Choice]]:
        self.n_ran += 1
        if self.n_ran == 2:
            self.written.wait(0.5)
        for s in plan.slices:
            self.rows.memory.reshape(2, N_PAGES, PAGE * ROW)[:, list(s.pages)] = 0
        return {s.rid: [Choice(9, 0.0, ())] for s in plan.slices if s.sample}


@pytest.mark.parametrize("depth", [2, 3])
def test_rows_are_not_overwritten_by_steps_of_a_request_that_has_left(decode: Side, memory: Memory, depth: int) -> None:
    """It leaves its pages to another one while its last step has yet to run, behind the loop."""
    written = threading.Event()

    def read(piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        check = copy_checked(piece.runs(memory.rows), runs)
        if piece.layer == 1:
            written.set()
        return check

    memory.read = read  # type: ignore[method-assign]
    memory.offers.complete(50, memory.pages)
    told = deque([[Add(7, list(range(12)), PARAMS)], [], [Abort(7), reserve(1)], [Follow(1, memory.offer)]])
    sent = decode.sent.extend
    channel: Any = SimpleNamespace(poll=lambda timeout: told.popleft() if told else [], send=lambda *m: sent(m))
    worker: Any = LateWorker(decode.rows, written)
    loop = Loop(worker, decode.scheduler, channel, depth, handing=decode.handing)
    while told or loop.pending:
        loop.turn()
    until = time.monotonic() + 5
    while decode.handing._fetches.fetching(1):  # type: ignore[union-attr]
        loop.turn()
        assert time.monotonic() < until
    assert worker.n_ran == 2
    here, there = (r.memory.reshape(2, N_PAGES * PAGE, ROW) for r in (decode.rows, memory.rows))
    pages = decode.scheduler.arriving[1].pages
    slots = [pages[i // PAGE] * PAGE + i % PAGE for i in range(5)]
    assert (here[:, slots] == there[:, :5]).all()


# The side that gives ------------------------------------------------------------------------------------------------


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    side = Side(monkeypatch)
    yield side
    side.handing.close()


def ready(side: Side) -> list[int]:
    """Up to which token each layer of the request is finished."""
    return side.offers._given[1].ready


def begin(side: Side, n: int = 5, rid: int = 1) -> Request:
    req = Request(rid, list(range(100, 100 + n)), 1, frozenset({EOS}))
    side.scheduler.add(req)
    side.handing.expect(rid, 2)
    return req


def step(side: Side, layers: Sequence[int] = (0, 1)) -> tuple[StepPlan, Wrote | None]:
    """One step of which these layers are computed."""
    plan = side.scheduler.plan()
    wrote = side.handing.planned(plan)
    for layer in layers if wrote else ():
        wrote(plan.slices, layer)  # type: ignore[misc]
    return plan, wrote


def computed(side: Side, token: int = 9) -> Request:
    """A prompt of five tokens whose first token is there."""
    req = begin(side)
    assert side.scheduler.commit(step(side)[0], {1: [token]}) == [req]
    return req


def test_a_prompt_is_offered_with_its_first_step_and_finished_layer_by_layer(prefill: Side) -> None:
    prefill.scheduler.max_step_tokens = 3
    begin(prefill)
    plan, wrote = step(prefill, [])
    (offered,) = prefill.sent
    assert isinstance(offered, Offered)
    assert (offered.rid, offered.offer.start, offered.offer.end) == (1, 2, 5)
    assert wrote is not None
    assert ready(prefill) == [2, 2]
    wrote(plan.slices, 0)
    assert ready(prefill) == [3, 2]
    wrote(plan.slices, 1)
    assert prefill.handing.pages == (0, 2)
    step(prefill)
    assert ready(prefill) == [5, 5]
    assert len(prefill.sent) == 1


def test_steps_that_nobody_waits_for_tell_nothing(prefill: Side) -> None:
    assert step(prefill)[1] is None
    prefill.scheduler.add(Request(7, [1, 2, 3], 2))
    assert step(prefill)[1] is None
    begin(prefill)
    assert prefill.handing.planned(StepPlan()) is None


def test_nothing_is_offered_of_a_request_that_has_lost_its_pages_until_it_runs_again(prefill: Side) -> None:
    """It is preempted while a step that was planned before still runs."""
    prefill.scheduler.max_step_tokens = 4
    older = Request(7, list(range(9)), 7)
    prefill.scheduler.add(older)
    while older.done < 9:
        prefill.scheduler.commit(step(prefill)[0], {7: [3]})
    begin(prefill, n=6)
    plan, running = step(prefill, [0])
    assert ready(prefill)[0] > 2
    while prefill.scheduler.live[1].pages:
        prefill.scheduler.commit(plan, {7: [3]})
        plan, _ = step(prefill, [])
    assert ready(prefill) == [2, 2]
    assert running is not None
    running([Slice(1, (100,), 0, (0, 1, 2), False)], 1)
    assert ready(prefill) == [2, 2]
    assert prefill.handing.drop(1) is False
    prefill.scheduler.abort(1)


def test_nothing_is_offered_of_steps_that_were_taken_back(prefill: Side) -> None:
    begin(prefill)
    plan, wrote = step(prefill, [0])
    prefill.scheduler.undo(plan)
    prefill.handing.rolled_back()
    assert wrote is not None
    wrote(plan.slices, 1)
    assert ready(prefill) == [2, 2]
    step(prefill)
    assert ready(prefill) == [5, 5]
    assert len(prefill.sent) == 1


def test_pages_of_a_computed_prompt_are_held_until_they_are_dropped(prefill: Side) -> None:
    req = computed(prefill)
    assert prefill.handing.hold(req, Token(1, 9, "length", None, [], 0))
    assert prefill.sent[-1] == Computed(Token(1, 9))
    assert prefill.offers.next(1, [2, 2], 0)[0].pages == tuple(req.pages[1:])  # type: ignore[index]
    assert prefill.handing.pages == (0, 3)
    assert prefill.handing.drop(1)
    assert prefill.n_held == 0
    assert prefill.handing.rests is None
    with pytest.raises(Withdrawn):
        prefill.offers.next(1, [2, 2], 0)


def test_a_lease_that_nobody_ends_ends(prefill: Side) -> None:
    assert prefill.handing.hold(computed(prefill), Token(1, 9, "length"))
    prefill.skipped = handing.LEASE + 1
    prefill.handing.turn()
    assert prefill.n_held == 0
    assert not prefill.handing.drop(1)
    with pytest.raises(Withdrawn):
        prefill.offers.end(1)


def test_what_ends_with_its_first_token_is_not_held(prefill: Side) -> None:
    req = computed(prefill, EOS)
    assert not prefill.handing.hold(req, Token(1, EOS, "stop"))
    prefill.scheduler.release(req)
    assert prefill.n_held == 0
    assert prefill.handing.pages == (0, 0)
    with pytest.raises(Withdrawn):
        prefill.offers.end(1)


def test_a_request_that_is_dropped_while_it_is_computed_is_offered_no_more(prefill: Side) -> None:
    begin(prefill)
    plan, wrote = step(prefill, [0])
    assert not prefill.handing.drop(1)
    assert prefill.scheduler.abort(1)
    assert wrote is not None
    wrote(plan.slices, 1)
    with pytest.raises(Withdrawn):
        prefill.offers.attempt(1)
    assert prefill.n_held == 0
