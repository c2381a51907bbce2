"""Rows of a KV cache reach another rank whole, or the rank is told in time that they do not."""

import contextlib
import errno
import functools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from brigade.comm.handshake import answer, welcome
from brigade.comm.kv import offers, shared
from brigade.comm.kv import rows as kv_rows
from brigade.comm.kv import tcp as kv_tcp
from brigade.comm.kv.link import Fetched, Fetches, Open
from brigade.comm.kv.nixl import Nixl, installed
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.offers import Offers
from brigade.comm.kv.rows import Bytes, Fast, Piece, Rows, checksum, copy, copy_checked
from brigade.comm.kv.shared import SharedCaches
from brigade.comm.kv.tcp import Caller, KvServer, _hello

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


def tokens(r: Rows, pages: list[int], start: int, end: int, layers: Sequence[int] = range(LAYERS)) -> bytes:
    """The rows of these tokens, the simple way."""
    cache = r.memory.reshape(LAYERS, r.n_pages, r.page, ROW)
    return b"".join(cache[x, pages[t // r.page], t % r.page].tobytes() for x in layers for t in range(start, end))


@functools.cache
def agents() -> tuple[Nixl, Nixl]:
    """One that gives and one that takes, for all tests."""
    return Nixl.start(Caller(SECRET)), Nixl.start(Caller(SECRET))


NIXL = pytest.param("nixl", marks=pytest.mark.skipif(not installed(), reason="nixl-cu12 is not installed"))


class Link:
    """Both sides of a link in this process."""

    def __init__(self, kind: str, source: Rows, file: int, target: Rows, deadline: float = 5.0) -> None:
        self.offers = Offers(source, 0 if kind == "shared" else -1)
        self.caller = Caller(SECRET, silence=deadline)
        if kind == "nixl":
            giving, self.taking = agents()
            self.offers.registered = giving.register(source.memory)
        self.server = KvServer(self.offers, "127.0.0.1", SECRET, deadline)
        self.offers.address = self.server.address
        self.fetches = Fetches(target, self.opener(kind, file), deadline)

    def opener(self, kind: str, file: int) -> Open:
        if kind == "shared":
            return SharedCaches([file], self.caller).open
        return self.taking.open if kind == "nixl" else self.caller.open

    def begin(self, rid: int, start: int, end: int) -> Offer:
        """An offer of which nothing is finished, as the other side gets it."""
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.offers.offer(rid, start, end)), type=Offer)

    def offer(self, rid: int, pages: list[int], start: int, end: int) -> Offer:
        """One whose rows are all finished."""
        offer = self.begin(rid, start, end)
        self.offers.complete(rid, pages)
        return offer

    def fetch(self, rid: int, offer: Offer, pages: list[int], start: int | None = None) -> Fetched:
        self.fetches.fetch(rid, offer, pages, offer.start if start is None else start)
        self.fetches.hurry(rid)
        return self.wait()

    def wait(self) -> Fetched:
        until = time.monotonic() + 20
        while not (ended := self.fetches.poll()):
            assert time.monotonic() < until, "a transfer never ends"
            time.sleep(0.001)
        return ended[0]

    def arrives(self, mine: list[int], theirs: list[int], layers: Sequence[int], start: int, end: int) -> bool:
        """Whether these rows come within a second."""
        until = time.monotonic() + 1
        while time.monotonic() < until:
            target, source = (
                tokens(r, p, start, end, layers) for r, p in ((self.fetches.rows, mine), (self.offers.rows, theirs))
            )
            if target == source:
                return True
            time.sleep(0.002)
        return False

    def close(self) -> None:
        self.fetches.close()
        self.server.close()


Make = Callable[..., Link]


@pytest.fixture(params=["shared", "tcp", NIXL])
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
def test_rows_arrive_between_pages_of_any_size_and_nothing_else_is_touched(
    make: Make, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kv_rows, kv_tcp):
        monkeypatch.setattr(module, "BLOCK", 100 if seed < 4 else kv_rows.BLOCK)
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


def test_an_offer_that_does_not_fit_is_refused(make: Make) -> None:
    link = make()
    offer = link.offer(1, [5, 6], 0, 8)
    assert "wanted" in link.fetch(2, offer, [0, 1], start=4).failure
    assert "wanted" in link.fetch(2, msgspec.structs.replace(offer, row_bytes=ROW + 2), [0, 1]).failure
    assert "wanted" in link.fetch(2, msgspec.structs.replace(offer, n_layers=2), [0, 1]).failure
    assert "not in 1 pages" in link.fetch(2, offer, [0]).failure
    assert "does not exist" in link.fetch(2, offer, [0, 99]).failure
    assert "not offered" in link.fetch(2, msgspec.structs.replace(offer, rid=99), [0, 1]).failure


class Damaging:
    """Turns a bit of a layer in the first few pieces of it that come, and says what was found then."""

    def __init__(self, link: Link, layer: int, times: int) -> None:
        self.inner, self.layer, self.times, self.n_opened = link.fetches._open, layer, times, 0
        link.fetches._open = self.open  # type: ignore[assignment]

    @contextlib.contextmanager
    def open(self, offer: Offer, have: Sequence[int]) -> Iterator["Damaging"]:
        self.n_opened += 1
        with self.inner(offer, have) as self.source:
            yield self

    def next(self, go_on: Callable[[], None]) -> Piece:
        return self.source.next(go_on)

    def check(self, go_on: Callable[[], None]) -> int | None:
        return self.source.check(go_on)

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: Callable[[], None]) -> int:
        filled = list(runs)
        found = self.source.read(piece, iter(filled), go_on)
        assert found == checksum(filled)  # of what was written, wherever it came from
        if self.times and piece.layer == self.layer:
            filled[0][3] ^= 0x40
            self.times -= 1
        return checksum(filled)


def test_a_piece_that_is_damaged_once_on_the_way_is_fetched_again_and_only_that(make: Make) -> None:
    link = make()
    damaging = Damaging(link, layer=1, times=1)
    assert link.fetch(2, link.offer(1, [5, 6], 0, 8), [0, 1]).failure == ""
    assert damaging.n_opened == 2
    assert tokens(link.fetches.rows, [0, 1], 0, 8) == tokens(link.offers.rows, [5, 6], 0, 8)


def test_a_piece_that_is_damaged_again_and_again_is_given_up(make: Make) -> None:
    link = make()
    Damaging(link, layer=1, times=99)
    assert (
        "the checksum of tokens 0 to 8 of layer 1 is wrong"
        in link.fetch(2, link.offer(1, [5, 6], 0, 8), [0, 1]).failure
    )


# While the prompt is computed ----------------------------------------------------------------------------------------


def test_each_layer_of_each_chunk_comes_while_the_next_is_not_computed_yet(make: Make) -> None:
    link = make()
    theirs, mine = [5, 9, 7], [2, 1, 0]
    link.fetches.fetch(4, link.begin(1, 2, 11), mine, 2)
    for n, end in ((2, 6), (3, 11)):
        for layer in range(LAYERS):
            link.offers.wrote(1, 0, layer, end, theirs[:n])
            assert link.arrives(mine, theirs, range(layer + 1), 2, end)
            assert not link.fetches.poll() or (end, layer) == (11, LAYERS - 1)
    assert tokens(link.fetches.rows, mine, 0, 2) != tokens(link.offers.rows, theirs, 0, 2)


def test_what_was_computed_twice_is_taken_from_where_it_lies_in_the_end(make: Make) -> None:
    """The request is preempted after its first chunk: others write into its pages, and it gets other ones."""
    link = make()
    source, mine = link.offers.rows, [0, 1]
    link.fetches.fetch(4, link.begin(1, 0, 8), mine, 0)
    link.offers.wrote(1, 0, 0, 4, [5])
    assert link.arrives(mine, [5], [0], 0, 4)
    link.offers.retract(1)
    cache = source.memory.reshape(LAYERS, 64, 4, ROW)
    cache[:, 9] = cache[:, 5]
    cache[:, 5] = 0
    link.offers.wrote(1, 0, 1, 8, [5, 6])  # from a step that was planned before
    for layer in range(LAYERS):
        link.offers.wrote(1, link.offers.attempt(1), layer, 8, [9, 6])
    assert link.wait().failure == ""
    assert tokens(link.fetches.rows, mine, 0, 8) == tokens(source, [9, 6], 0, 8)


def test_no_checksum_is_told_of_pages_that_are_given_back_while_it_is_made(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = make()
    link.offer(1, [5, 6], 0, 8)
    real = offers.checksum

    def slow(runs: Iterator[Bytes]) -> int:
        link.offers.retract(1)
        return real(runs)

    monkeypatch.setattr(offers, "checksum", slow)
    found = link.offers.next(1, [0] * LAYERS, 0)
    assert found is not None
    assert found[1]() is None
    assert link.offers.next(1, [0] * LAYERS, 0) is None
    monkeypatch.setattr(offers, "checksum", real)
    link.offers.complete(1, [5, 6])
    found = link.offers.next(1, [0, 8, 8], 0)
    assert found is not None
    assert (found[0], found[1]()) == (Piece(0, 0, 8, (5, 6)), real(found[0].runs(link.offers.rows)))


def test_a_piece_whose_pages_are_given_back_while_it_is_copied_comes_again_without_a_fault(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, real, n = make(), offers.checksum, 0

    def slow(runs: Iterator[Bytes]) -> int:
        nonlocal n
        n += 1
        if n == 1:  # the request loses its pages, and gets others
            link.offers.retract(1)
            link.offers.rows.memory[5 * 4 * ROW : 6 * 4 * ROW] ^= 1
            link.offers.complete(1, [9, 6])
        return real(runs)

    monkeypatch.setattr(offers, "checksum", slow)
    opened = Damaging(link, layer=0, times=0)
    assert link.fetch(2, link.offer(1, [5, 6], 0, 8), [0, 1]).failure == ""
    assert (opened.n_opened, n) == (1, LAYERS + 1)
    assert tokens(link.fetches.rows, [0, 1], 0, 8) == tokens(link.offers.rows, [9, 6], 0, 8)


def test_pages_that_are_used_again_before_they_are_copied_are_noticed(make: Make) -> None:
    link = make()
    inner = link.fetches._open

    @contextlib.contextmanager
    def late(offer: Offer, have: Sequence[int]) -> Iterator[object]:
        with inner(offer, have) as source:
            time.sleep(0.1)  # all that is told is on its way
            link.offers.rows.memory[5 * 4 * ROW : 7 * 4 * ROW] ^= 1
            yield source

    link.fetches._open = late  # type: ignore[assignment]
    offer = link.offer(1, [5, 6], 0, 8)
    before = tokens(link.offers.rows, [5, 6], 0, 8)
    failure = link.fetch(2, offer, [0, 1]).failure
    apart = offer.file >= 0 or offer.registered is not None
    assert ("is wrong" in failure) if apart else tokens(link.fetches.rows, [0, 1], 0, 8) == before


def test_another_rank_gives_the_rest_when_the_first_is_lost(make: Make) -> None:
    one, two = make(), make()
    two.offers.rows.memory[:] = one.offers.rows.memory
    one.fetches.fetch(4, one.begin(1, 0, 8), [0, 1], 0)
    one.offers.wrote(1, 0, 0, 8, [5, 6])
    assert one.arrives([0, 1], [5, 6], [0], 0, 8)
    one.server.close()
    two.offers.file = one.offers.file
    offer = two.begin(7, 0, 8)
    one.fetches.move(4, offer)
    one.fetches.move(4, offer)
    two.offers.wrote(7, 0, 0, 8, [5, 6])
    for layer in (1, 2):
        two.offers.wrote(7, 0, layer, 8, [5, 6])
    assert one.wait().failure == ""
    assert tokens(one.fetches.rows, [0, 1], 0, 8) == tokens(two.offers.rows, [5, 6], 0, 8)


def test_while_nothing_is_finished_a_transfer_neither_fails_nor_holds_up_its_end(make: Make) -> None:
    link = make(deadline=0.4)
    link.server.beat = 0.1
    link.fetches.fetch(4, link.begin(1, 0, 8), [0, 1], 0)
    time.sleep(0.8)
    assert link.fetches.poll() == []
    began = time.monotonic()
    link.fetches.stop(4)
    assert link.fetches.fetching(4)
    assert "stopped" in link.wait().failure
    assert time.monotonic() - began < 0.3


def test_a_link_that_is_down_while_the_prompt_is_computed_costs_nothing(make: Make) -> None:
    link = make()
    offer = msgspec.structs.replace(link.begin(1, 0, 8), address="127.0.0.1:1")
    link.fetches.fetch(4, offer, [0, 1], 0)
    time.sleep(0.1)
    assert link.fetches.poll() == []
    link.offers.complete(1, [5, 6])
    link.fetches.move(4, msgspec.structs.replace(offer, address=link.offers.address))
    assert link.wait().failure == ""


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


def test_a_side_that_withdraws_while_it_is_followed_says_so(tcp: Link) -> None:
    tcp.fetches.fetch(2, tcp.begin(1, 0, 8), [0, 1], 0)
    time.sleep(0.05)
    tcp.offers.withdraw(1)
    tcp.fetches.hurry(2)
    assert "not offered any more" in tcp.wait().failure


def test_nobody_gets_rows_without_the_secret(tcp: Link) -> None:
    offer = tcp.offer(1, [5, 6], 0, 8)
    before = tcp.fetches.rows.memory.copy()
    tcp.fetches._open = Caller(b"another secret, as long").open  # type: ignore[assignment]
    assert "secret" in tcp.fetch(2, offer, [0, 1]).failure
    assert (tcp.fetches.rows.memory == before).all()


def test_a_side_that_says_nothing_costs_no_more_than_the_deadline(tcp: Link) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offer = msgspec.structs.replace(tcp.offer(1, [5, 6], 0, 8), address=f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert tcp.fetch(2, offer, [0, 1]).failure
    assert time.monotonic() - began < 1.5


def test_a_link_that_stalls_in_the_middle_ends_at_the_deadline(tcp: Link) -> None:
    port, tap = stalling(tcp.server.address, after=700)
    with tap:
        offer = msgspec.structs.replace(tcp.offer(1, list(range(16)), 0, 64), address=f"127.0.0.1:{port}")
        began = time.monotonic()
        assert tcp.fetch(2, offer, list(range(16))).failure
        assert 0.4 < time.monotonic() - began < 1.5
    assert not tcp.fetches.fetching(2)


def test_a_side_that_is_gone_is_a_failure_not_an_exception(tcp: Link) -> None:
    offer = tcp.offer(1, [5, 6], 0, 8)
    tcp.server.close()
    assert tcp.fetch(2, offer, [0, 1]).failure


def test_callers_that_say_nothing_keep_no_rank_out(tcp: Link) -> None:
    """More of them than there is room for, all at once, and more while rows are fetched."""
    host, _, port = tcp.server.address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        assert not tcp.fetch(2, tcp.offer(1, [5, 6], 0, 8), [0, 1]).failure


def test_a_caller_that_cannot_be_taken_is_not_the_end(tcp: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A listener that once has no file number left for a caller."""

        def __init__(self, listener: socket.socket) -> None:
            self.listener, self.n_failed = listener, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.listener, name)

        def accept(self) -> Any:
            if not self.n_failed:
                self.n_failed += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.listener.accept()

    full = Full(tcp.server._listener)
    monkeypatch.setattr(tcp.server, "_listener", full)
    for rid in 2, 3:  # the first is taken by the accept that waits already
        assert not tcp.fetch(rid, tcp.offer(rid, [5, 6], 0, 8), [0, 1]).failure
    assert full.n_failed == 1


PIECE = struct.Struct("!III")
ZEROS = bytes(8 * ROW)
GOOD = PIECE.pack(0, 0, 8) + ZEROS + struct.pack("!BQ", 1, xxhash.xxh3_64_intdigest(ZEROS))


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (GOOD + GOOD, "tokens 0 to 8 of layer 0 come out of turn"),
        (PIECE.pack(0, 0, 8) + ZEROS + struct.pack("!BQ", 0, 0) + GOOD + GOOD, "layer 0 come out of turn"),
        (PIECE.pack(0, 0, 8) + ZEROS + struct.pack("!BQ", 1, 5), "checksum of tokens 0 to 8 of layer 0 is wrong"),
        (PIECE.pack(LAYERS, 0, 8), "come out of turn"),
        (PIECE.pack(0, 0, 9), "tokens 0 to 9 of layer 0 come out of turn"),
        (PIECE.pack(0, 4, 8), "come out of turn"),
        (PIECE.pack(0, 0, 0), "come out of turn"),
        (GOOD[:50], "closed the connection"),
        (GOOD[:-1], "closed the connection"),
    ],
)
def test_what_is_delivered_twice_or_makes_no_sense_is_a_failure(tcp: Link, says: bytes, why: str) -> None:
    tcp.fetches._deadline = 5

    def speak() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = server.accept()
                with sock, contextlib.suppress(OSError):
                    until = time.monotonic() + 5
                    answer(sock, _hello(LAYERS, ROW), SECRET, until)
                    welcome(sock, until)
                    sock.sendall(says)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1 << 16):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=speak, daemon=True).start()
        offer = msgspec.structs.replace(tcp.begin(1, 0, 8), address=f"127.0.0.1:{server.getsockname()[1]}")
        assert why in tcp.fetch(2, offer, [0, 1]).failure
        server.shutdown(socket.SHUT_RDWR)


def test_a_rank_that_offers_does_not_mind_nonsense(tcp: Link) -> None:
    host, _, port = tcp.server.address.rpartition(":")
    for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", random.Random(1).randbytes(4096)):
        with socket.create_connection((host, int(port)), 1) as sock:
            sock.sendall(nonsense)
    assert tcp.fetch(2, tcp.offer(1, [5, 6], 0, 8), [0, 1]).failure == ""


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
    port, tap = stalling(tcp.server.address, after=700)
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


def test_what_copies_says_the_checksum_of_what_it_wrote_and_asks_the_fast_way_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_rows, "BLOCK", 50)
    monkeypatch.setattr(kv_rows, "FAST_RUN", 64)
    source, got = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    pieces, asked = [source[:100], source[100:103], source[103:]], list[list[int]]()

    def fast(serves: bool) -> Fast:
        def copies(runs: Sequence[tuple[Bytes, Bytes]]) -> int | None:
            asked.append([a.size for a, _ in runs])
            return 7 if serves else None

        return copies

    for way in (None, fast(False)):
        got[:] = 0
        assert copy_checked(pieces, [got[:101], got[101:]], way) == xxhash.xxh3_64_intdigest(bytes(source))
        assert (got == source).all()
    assert copy_checked(pieces, [got[:101], got[101:]], fast(True)) == 7
    assert asked == [[100, 1, 2, 153]] * 2
    shorter = [got[n : n + 50] for n in range(0, 256, 50)]
    assert copy_checked([source], shorter, fast(True)) == xxhash.xxh3_64_intdigest(bytes(source))
    copy([source[::-1]], [got[:7], got[7:]])
    assert (got == source[::-1]).all()
