"""Rows of a KV cache reach another rank whole, or the rank is told in time that they do not."""

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from brigade.comm.kv import shared
from brigade.comm.kv.link import Fetched, Fetches, Offers, Open
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Rows
from brigade.comm.kv.shared import SharedCaches
from brigade.comm.kv.tcp import Caller, KvServer

LAYERS, ROW = 3, 48
SECRET = b"sixteen bytes or more"


def rows(n_pages: int, page: int, seed: int = 0, file: int = -1) -> Rows:
    n = LAYERS * n_pages * page * ROW
    if file >= 0:
        os.ftruncate(file, n)
        memory = np.memmap(os.fdopen(os.dup(file), "r+b"), np.uint8)
        memory[:] = np.random.default_rng(seed).integers(0, 256, n, np.uint8)
    else:
        memory = np.random.default_rng(seed).integers(0, 256, n, np.uint8)
    return Rows(memory, LAYERS, page, ROW)


def tokens(r: Rows, pages: list[int], start: int, end: int) -> bytes:
    """The rows of these tokens, the simple way."""
    cache = r.memory.reshape(LAYERS, r.n_pages, r.page, ROW)
    return b"".join(
        cache[x, pages[t // r.page], t % r.page].tobytes() for x in range(LAYERS) for t in range(start, end)
    )


class Link:
    """Both sides of a link in this process."""

    def __init__(self, kind: str, source: Rows, file: int, target: Rows, deadline: float = 5.0) -> None:
        self.offers = Offers(source, 0 if kind == "shared" else -1)
        self.server: KvServer | None = None
        opener: Open
        if kind == "shared":
            opener = SharedCaches([file]).open
        else:
            self.server = KvServer(self.offers, "127.0.0.1", SECRET, deadline)
            self.offers.address = self.server.address
            opener = Caller(SECRET).open
        self.fetches = Fetches(target, opener, deadline)

    def offer(self, rid: int, pages: list[int], start: int, end: int) -> Offer:
        self.offers.offer(rid, pages, start, end)
        while not (ready := self.offers.poll()):
            time.sleep(0.001)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(ready[0]), type=Offer)

    def fetch(self, rid: int, offer: Offer, pages: list[int], start: int | None = None) -> Fetched:
        self.fetches.fetch(rid, offer, pages, offer.start if start is None else start)
        return self.wait()

    def wait(self) -> Fetched:
        until = time.monotonic() + 20
        while not (ended := self.fetches.poll()):
            assert time.monotonic() < until, "a transfer never ends"
            time.sleep(0.001)
        return ended[0]

    def close(self) -> None:
        self.fetches.close()
        self.offers.close()
        if self.server:
            self.server.close()


Make = Callable[..., Link]


@pytest.fixture(params=["shared", "tcp"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    links, files = list[Link](), list[int]()

    def made(source_page: int = 4, target_page: int = 4, deadline: float = 5.0) -> Link:
        files.append(shared.create())
        source = rows(64, source_page, 1, files[-1])
        links.append(Link(request.param, source, files[-1], rows(64, target_page, 2), deadline))
        return links[-1]

    yield made
    for link in links:
        link.close()
    for file in files:
        os.close(file)


@pytest.mark.parametrize("seed", range(8))
def test_rows_arrive_between_pages_of_any_size_and_nothing_else_is_touched(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    link = make(rng.choice((1, 3, 4, 16)), rng.choice((1, 3, 4, 16)))
    source, target = link.offers.rows, link.fetches.rows
    end = rng.randint(1, 64)
    start = rng.choice((0, rng.randrange(end)))
    take = rng.sample(range(64), 64) if seed % 2 else list(range(64))
    theirs, mine = take[: -(-end // source.page)], rng.sample(range(64), -(-end // target.page))
    untouched = [(p, t) for p in range(64) for t in range(target.page)]
    before = target.memory.copy().reshape(LAYERS, 64, target.page, ROW)
    offer = link.offer(7, theirs, start, end)
    assert link.fetch(9, offer, mine)[:2] == (9, "")
    assert tokens(target, mine, start, end) == tokens(source, theirs, start, end)
    written = {(mine[t // target.page], t % target.page) for t in range(start, end)}
    after = target.memory.reshape(LAYERS, 64, target.page, ROW)
    for page, slot in set(untouched) - written:
        assert (after[:, page, slot] == before[:, page, slot]).all()


def test_the_same_offer_may_be_fetched_twice_but_not_at_once_into_the_same_request(make: Make) -> None:
    link = make()
    offer = link.offer(1, [5, 6], 0, 8)
    link.fetches.fetch(2, offer, [0, 1], 0)
    with pytest.raises(ValueError, match="being fetched already"):
        link.fetches.fetch(2, offer, [3, 4], 0)
    assert link.wait().failure == ""
    assert link.fetch(3, offer, [3, 4]).failure == ""
    target = link.fetches.rows
    assert tokens(target, [0, 1], 0, 8) == tokens(target, [3, 4], 0, 8)


def test_pages_that_were_used_again_are_noticed(make: Make) -> None:
    link = make()
    offer = link.offer(1, [5, 6], 0, 8)
    link.offers.rows.memory[5 * 4 * ROW] ^= 1
    failure = link.fetch(2, offer, [0, 1]).failure
    assert "checksums of layers [0] are wrong" in failure
    link.offers.rows.memory[5 * 4 * ROW] ^= 1
    assert link.fetch(2, offer, [0, 1]).failure == ""


def test_an_offer_that_does_not_fit_is_refused(make: Make) -> None:
    link = make()
    offer = link.offer(1, [5, 6], 0, 8)
    assert "wanted" in link.fetch(2, offer, [0, 1], start=4).failure
    assert "wanted" in link.fetch(2, msgspec.structs.replace(offer, row_bytes=ROW + 2), [0, 1]).failure
    assert "wanted" in link.fetch(2, msgspec.structs.replace(offer, checks=offer.checks[:2]), [0, 1]).failure
    assert "not in 1 pages" in link.fetch(2, offer, [0]).failure
    for bad in ([99, 6], [-1, 6]):
        assert link.fetch(2, msgspec.structs.replace(offer, pages=bad, rid=99), [0, 1]).failure


def test_a_layer_that_is_damaged_once_on_the_way_is_fetched_again(make: Make) -> None:
    link = make()
    offer = link.offer(1, [5, 6], 0, 8)
    inner, n_opened = link.fetches._open, 0

    @contextlib.contextmanager
    def damaging(offer: Offer, until: float) -> Iterator[object]:
        nonlocal n_opened
        n_opened += 1
        with inner(offer, until) as source:
            yield Damaged(source, n_opened == 1)

    class Damaged:
        def __init__(self, source: object, damage: bool) -> None:
            self.source, self.damage = source, damage

        def read(self, layer: int, runs: object, until: float) -> Iterator[object]:
            for run in self.source.read(layer, runs, until):  # type: ignore[attr-defined]
                if self.damage and layer == 1:
                    run[3] ^= 0x40
                yield run

    link.fetches._open = damaging  # type: ignore[assignment]
    assert link.fetch(2, offer, [0, 1]).failure == ""
    assert n_opened == 2
    assert tokens(link.fetches.rows, [0, 1], 0, 8) == tokens(link.offers.rows, [5, 6], 0, 8)


# TCP alone -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tcp() -> Iterator[Link]:
    link = Link("tcp", rows(64, 4, 1), -1, rows(64, 4, 2), deadline=0.6)
    yield link
    link.close()


def test_what_was_withdrawn_is_not_given_out(tcp: Link) -> None:
    offer = tcp.offer(1, [5, 6], 0, 8)
    tcp.offers.withdraw(1)
    assert "not offered any more" in tcp.fetch(2, offer, [0, 1]).failure


def test_nobody_gets_rows_without_the_secret(tcp: Link) -> None:
    offer = tcp.offer(1, [5, 6], 0, 8)
    before = tcp.fetches.rows.memory.copy()
    tcp.fetches._open = Caller(b"another secret, as long").open
    assert "secret" in tcp.fetch(2, offer, [0, 1]).failure
    assert (tcp.fetches.rows.memory == before).all()


def test_a_side_that_says_nothing_costs_no_more_than_the_deadline(tcp: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer = msgspec.structs.replace(tcp.offer(1, [5, 6], 0, 8), address=f"127.0.0.1:{silent.getsockname()[1]}")
        fetched = tcp.fetch(2, offer, [0, 1])
    assert fetched.failure
    assert fetched.seconds < 1.5


def test_a_link_that_stalls_in_the_middle_ends_at_the_deadline_and_stops_at_once_when_told(tcp: Link) -> None:
    port, tap = stalling(tcp.server.address, after=700)  # type: ignore[union-attr]
    with tap:
        offer = msgspec.structs.replace(tcp.offer(1, list(range(16)), 0, 64), address=f"127.0.0.1:{port}")
        fetched = tcp.fetch(2, offer, list(range(16)))
        assert fetched.failure
        assert 0.4 < fetched.seconds < 1.5
    assert not tcp.fetches.pending


def test_a_side_that_is_gone_is_a_failure_not_an_exception(tcp: Link) -> None:
    offer = tcp.offer(1, [5, 6], 0, 8)
    tcp.server.close()  # type: ignore[union-attr]
    assert tcp.fetch(2, offer, [0, 1]).failure


def stalling(address: str, after: int) -> tuple[int, contextlib.ExitStack]:
    """A way to `address` on which nothing more comes back after so many bytes."""
    host, _, port = address.rpartition(":")
    server, stack = socket.create_server(("127.0.0.1", 0)), contextlib.ExitStack()

    def pump(source: socket.socket, target: socket.socket, limit: int) -> None:
        n = 0
        with contextlib.suppress(OSError):
            while n < limit and (data := source.recv(min(4096, limit - n))):
                target.sendall(data)
                n += len(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection((host, int(port)))
                for s in (near, far):
                    stack.callback(s.close)
                threading.Thread(target=pump, args=(near, far, 1 << 30), daemon=True).start()
                threading.Thread(target=pump, args=(far, near, after), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    stack.callback(server.close)
    return server.getsockname()[1], stack


def test_a_transfer_that_is_stopped_owns_its_pages_until_it_has_ended_and_tells_so_once(tcp: Link) -> None:
    port, tap = stalling(tcp.server.address, after=700)  # type: ignore[union-attr]
    with tap:
        offer = msgspec.structs.replace(tcp.offer(1, list(range(16)), 0, 64), address=f"127.0.0.1:{port}")
        tcp.fetches.fetch(2, offer, list(range(16)), 0)
        time.sleep(0.1)
        tcp.fetches.stop(2)
        assert tcp.fetches.fetching(2)
        assert tcp.wait().failure
    assert not tcp.fetches.fetching(2)
    assert tcp.fetches.poll() == []


def test_rows_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="not whole pages"):
        Rows(np.zeros(LAYERS * 5 * ROW, np.uint8), LAYERS, 2, ROW)
