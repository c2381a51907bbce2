"""A rank's side of hand-overs: what it is told twice, late or never leaves no page behind."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from brigade.comm.kv.link import Fetches, Offers
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, Rows, copy
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler
from brigade.engine import handing
from brigade.engine.handing import Handing
from brigade.engine.messages import Adopt, Adopted, Gone, Offered, Refused, Reserve, Reserved, Token
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
        offers = Offers(self.rows) if open_source is None else None
        fetches = Fetches(self.rows, open_source, 5) if open_source else None
        self.handing = Handing(worker, self.scheduler, channel, offers, fetches)
        self.skipped = 0.0
        clock = time.monotonic
        monkeypatch.setattr(handing, "time", SimpleNamespace(monotonic=lambda: clock() + self.skipped))

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
    """A source of rows that waits until it is let go."""

    def __init__(self, source: Rows) -> None:
        self.source, self.go = source, threading.Event()
        self.go.set()

    def open(self, offer: Offer, until: float) -> AbstractContextManager["Memory"]:
        self.offer = offer
        return nullcontext(self)

    def read(self, layer: int, runs: Iterator[Bytes], until: float) -> Iterator[Bytes]:
        assert self.go.wait(5)
        return copy(self.source.runs(layer, self.offer.pages, self.offer.start, self.offer.end), runs)


@pytest.fixture
def memory() -> Memory:
    return Memory(rows(1))


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Iterator[Side]:
    side = Side(monkeypatch, memory.open)
    yield side
    memory.go.set()
    side.handing.close()


def offer_of(memory: Memory, n: int, start: int = 0) -> Offer:
    pages = list(range(-(-n // PAGE)))
    checks = [memory.source.check(layer, pages, start, n) for layer in range(2)]
    return Offer(50, pages, PAGE, N_PAGES, start, n, ROW, checks)


def reserve(rid: int, n: int = 5) -> Reserve:
    return Reserve(rid, list(range(100, 100 + n)), n, PARAMS)


def test_an_adopt_that_is_told_twice_is_done_once(decode: Side, memory: Memory) -> None:
    decode.handing.take(reserve(1))
    assert decode.turns(Reserved) == []
    assert decode.sent.popleft() == Reserved(1, 0)
    for _ in range(2):
        decode.handing.take(Adopt(1, 9, offer_of(memory, 5)))
    assert decode.turns(Adopted) == [(1, list(range(100, 105)), PARAMS, [9])]
    decode.handing.take(Adopt(1, 9, offer_of(memory, 5)))
    assert [type(m) for m in decode.sent] == [Adopted, Gone]
    assert [r.rid for r in decode.scheduler.running] == [1]


def test_pages_are_reserved_for_the_most_urgent_requests_first(decode: Side) -> None:
    for rid, priority in (1, 0), (2, 5), (3, -2), (4, 0):
        decode.handing.take(Reserve(rid, list(range(10 * rid, 10 * rid + 5)), 5, PARAMS, priority=priority))
    decode.handing.turn()
    assert [m.rid for m in decode.sent] == [3, 1], "three pages each, of eight"
    decode.handing.drop(3)
    decode.handing.turn()
    assert [m.rid for m in decode.sent] == [3, 1, 4]


def test_pages_of_a_dropped_request_come_back_when_nothing_is_written_any_more(decode: Side, memory: Memory) -> None:
    decode.handing.take(reserve(1))
    decode.turns(Reserved)
    memory.go.clear()
    decode.handing.take(Adopt(1, 9, offer_of(memory, 5)))
    assert decode.handing.drop(1)
    assert decode.handing.turn() == []
    assert decode.n_held == 3
    assert decode.handing.pages == (3, 0)
    memory.go.set()
    until = time.monotonic() + 5
    while decode.n_held:
        assert decode.handing.turn() == []
        assert time.monotonic() < until
    assert not any(isinstance(m, Adopted) for m in decode.sent)
    assert decode.handing.rests is None


def test_what_cannot_be_fetched_is_computed_here(decode: Side, memory: Memory) -> None:
    decode.handing.take(reserve(1))
    decode.turns(Reserved)
    memory.source.memory[0] ^= 1
    offer = offer_of(memory, 5)
    memory.source.memory[0] ^= 1
    decode.handing.take(Adopt(1, 9, offer))
    assert decode.turns(Adopted) == [(1, list(range(100, 105)), PARAMS, [9])]
    assert "checksums" in decode.sent[-1].failure
    assert [s.tokens for s in decode.scheduler.plan().slices] == [(*range(100, 105), 9)]


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


def test_what_can_never_fit_is_refused(decode: Side) -> None:
    decode.handing.take(reserve(1, 40))
    assert [type(m) for m in decode.sent] == [Refused]


# The side that gives ------------------------------------------------------------------------------------------------


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    side = Side(monkeypatch)
    yield side
    side.handing.close()


def computed(side: Side, token: int = 9) -> Request:
    """A prompt of five tokens whose first token is there."""
    req = Request(1, list(range(100, 105)), 1, frozenset({EOS}))
    side.scheduler.add(req)
    side.handing.expect(1, 2)
    assert side.scheduler.commit(side.scheduler.plan(), {1: token}) == [req]
    return req


def test_pages_of_a_computed_prompt_are_held_until_they_are_dropped(prefill: Side) -> None:
    req = computed(prefill)
    assert prefill.handing.hold(req, Token(1, 9, "length", None, [], 0))
    prefill.turns(Offered)
    (offered,) = prefill.sent
    assert offered.token == Token(1, 9)
    assert (offered.offer.start, offered.offer.end, offered.offer.pages) == (2, 5, req.pages)
    assert prefill.handing.pages == (0, 3)
    assert prefill.handing.drop(1)
    assert prefill.n_held == 0
    assert prefill.handing.rests is None


def test_a_lease_that_nobody_ends_ends(prefill: Side) -> None:
    assert prefill.handing.hold(computed(prefill), Token(1, 9, "length"))
    prefill.turns(Offered)
    prefill.skipped = handing.LEASE + 1
    prefill.handing.turn()
    assert prefill.n_held == 0
    assert not prefill.handing.drop(1)


def test_what_ends_with_its_first_token_is_not_held(prefill: Side) -> None:
    req = computed(prefill, EOS)
    assert not prefill.handing.hold(req, Token(1, EOS, "stop"))
    prefill.scheduler.release(req)
    assert prefill.n_held == 0
