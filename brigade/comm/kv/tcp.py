"""Over TCP: what is finished of an offer, and the rows themselves for ranks that share no memory. Authenticated by the
fleet's secret, no pickle, bounded frames.

    caller                                      the rank that offers
      handshake (brigade.comm.handshake)
      follow: offer, what it has of each layer, whether rows are to come here ──►
                                          ◄──   piece: layer, tokens, then its rows or its page table
                                          ◄──   whether it is worth anything, and its checksum
                                          ◄──   beat, while nothing more is finished
                                          ◄──   gone: it is not offered any more
      ...
      closes

One connection for each transfer, so what went wrong in one leaves nothing behind in the next. Rows go from the cache
into the socket and from the socket into the cache.
"""

import contextlib
import hashlib
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

import xxhash

from brigade.comm.handshake import Hello, Refused, answer, call, welcome
from brigade.comm.kv.link import Failed, GoOn
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.offers import Offers, Withdrawn
from brigade.comm.kv.rows import BLOCK, Bytes, Piece
from brigade.comm.meeting import Strangers, end, listen

log = logging.getLogger("brigade.kv")

_FOLLOW = struct.Struct("!QB")
_PIECE, _CHECK = struct.Struct("!III"), struct.Struct("!BQ")
_BEAT, _GONE = 0xFFFFFFFF, 0xFFFFFFFE
"""In place of a layer."""
_CALL_S = 5.0
"""Seconds for a connection and its handshake, on the side that calls."""
_HANDSHAKE_S = 2.0
"""Seconds that a caller has for its part of it."""
BEAT_S = 1.0
"""Seconds between two signs of life while nothing more is finished."""
SILENCE_S = 5.0
"""Seconds without a byte after which the other side counts as lost."""
_TICK_S = 0.05
"""Seconds between two looks at what others want of a transfer that waits."""
_MAX_CALLERS = 256
"""Ranks that follow offers at a time."""
_PIECES = 64
"""Runs that one system call sends."""


def _hello(n_layers: int, row_bytes: int) -> Hello:
    layout = hashlib.sha256(f"kv {n_layers} {row_bytes}".encode()).digest()
    return Hello(rank=0, size=0, generation=0, layout=layout, nonce=os.urandom(32))


class KvServer:
    """Tells what a rank has finished, and gives it out. Threads of its own; `close` ends them."""

    def __init__(self, offers: Offers, host: str, secret: bytes, deadline: float) -> None:
        """`deadline`: seconds that a caller may let a send wait. Raises OSError if nobody can listen there."""
        self._offers, self._secret, self._deadline, self.beat = offers, secret, deadline, BEAT_S
        self._listener = listen(host)
        port = self._listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._strangers = Strangers()
        self._callers: set[socket.socket] = set()
        self._lock, self._closed = threading.Lock(), False
        threading.Thread(target=self._accept, name="kv-server", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        end(self._listener)  # it wakes the thread that accepts
        self._listener.close()
        self._strangers.end()
        with self._lock:
            for sock in self._callers:
                end(sock)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as e:  # the caller has left again, this process has too many files open, or it is the end
                if not self._closed:
                    log.info("a caller for KV rows cannot be taken now: %s", e)
                    time.sleep(_TICK_S)
                continue
            self._strangers.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="kv-caller", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        rows = self._offers.rows
        try:
            with sock:
                until = time.monotonic() + _HANDSHAKE_S
                answer(sock, _hello(rows.n_layers, rows.row_bytes), self._secret, until)
                self._know(sock)
                welcome(sock, until)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(self._deadline)
                rid, with_rows = _FOLLOW.unpack(_receive(sock, _FOLLOW.size))
                have = list(struct.unpack(f"!{rows.n_layers}I", _receive(sock, 4 * rows.n_layers)))
                self._give(sock, rid, bool(with_rows), have)
        except (Refused, OSError, ValueError) as e:
            log.info("a caller for KV rows has gone: %s", e)
        finally:
            self._strangers.discard(sock)
            with self._lock:
                self._callers.discard(sock)

    def _know(self, sock: socket.socket) -> None:
        """It is a rank. Raises ConnectionError if there is no room for it: it tries again."""
        with self._lock:
            if len(self._callers) >= _MAX_CALLERS:
                raise ConnectionError(f"{_MAX_CALLERS} ranks follow offers already")
            self._callers.add(sock)
        self._strangers.discard(sock)  # last: `close` finds it in one of the two

    def _give(self, sock: socket.socket, rid: int, with_rows: bool, have: list[int]) -> None:
        """All that is finished, in the order in which it is, until the caller has everything or goes."""
        try:
            end = self._offers.end(rid)
            while any(h < end for h in have):
                if (found := self._offers.next(rid, have, self.beat)) is None:
                    sock.sendall(_PIECE.pack(_BEAT, 0, 0))
                    continue
                piece, make_check = found
                head = _PIECE.pack(*piece[:3])
                if with_rows:
                    _send(sock, head, piece.runs(self._offers.rows))
                else:
                    sock.sendall(head + struct.pack(f"!{len(piece.pages)}I", *piece.pages))
                check = make_check()  # while the other side copies
                sock.sendall(_CHECK.pack(check is not None, check or 0))
                if check is not None:
                    have[piece.layer] = piece.end
        except Withdrawn:
            sock.sendall(_PIECE.pack(_GONE, 0, 0))


class Caller:
    """Opens offers of other ranks."""

    def __init__(self, secret: bytes, silence: float = SILENCE_S) -> None:
        self._secret, self.silence = secret, silence

    @contextlib.contextmanager
    def open(self, offer: Offer, have: Sequence[int]) -> Iterator["Connected"]:
        """The source of an offer, whose rows come over this connection. Raises Failed, OSError."""
        with self.connect(offer, have, with_rows=True) as sock:
            yield Connected(sock, offer, self.silence)

    @contextlib.contextmanager
    def connect(self, offer: Offer, have: Sequence[int], with_rows: bool) -> Iterator[socket.socket]:
        """Follow an offer. Raises Failed, OSError."""
        host, _, port = offer.address.rpartition(":")
        if not host:
            raise Failed("the offer names no address")
        patience = min(_CALL_S, self.silence)
        with socket.create_connection((host, int(port)), patience) as sock:
            call(sock, _hello(offer.n_layers, offer.row_bytes), self._secret, time.monotonic() + patience)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_FOLLOW.pack(offer.rid, with_rows) + struct.pack(f"!{len(have)}I", *have))
            sock.settimeout(_TICK_S)
            yield sock


class Connected:
    """Rows that come over the connection which tells of them."""

    with_rows = True

    def __init__(self, sock: socket.socket, offer: Offer, silence: float) -> None:
        self._sock, self._offer, self._silence = sock, offer, silence

    def next(self, go_on: GoOn) -> Piece:
        head = bytearray(_PIECE.size)
        while True:
            self._fill(memoryview(head), go_on)
            layer, start, end = _PIECE.unpack(head)
            if layer == _GONE:
                raise Failed("it is not offered any more")
            if layer != _BEAT:
                return Piece(layer, start, end, self._pages(start, end, go_on))

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        del piece
        hashed = xxhash.xxh3_64()
        for run in runs:
            for part in self._receive(run.data, go_on):
                hashed.update(part)
        return hashed.intdigest()

    def check(self, go_on: GoOn) -> int | None:
        tail = bytearray(_CHECK.size)
        self._fill(memoryview(tail), go_on)
        good, check = _CHECK.unpack(tail)
        return int(check) if good else None

    def _pages(self, start: int, end: int, go_on: GoOn) -> tuple[int, ...]:
        """Those of a piece, where its rows do not come here."""
        if self.with_rows:
            return ()
        if not start < end <= self._offer.end:
            raise Failed(f"tokens {start} to {end} are not offered")
        table = bytearray(4 * (-(-end // self._offer.page) - start // self._offer.page))
        self._fill(memoryview(table), go_on)
        return struct.unpack(f"!{len(table) // 4}I", table)

    def _fill(self, view: memoryview, go_on: GoOn) -> None:
        """Raises as `_receive`."""
        for _ in self._receive(view, go_on):
            pass

    def _receive(self, view: memoryview, go_on: GoOn) -> Iterator[memoryview]:
        """Exactly so many bytes; gives each part as soon as it is there, and in the core's cache. Raises Failed when
        the other side closes or is silent for too long."""
        heard = time.monotonic()
        while view:
            go_on()
            try:
                n = self._sock.recv_into(view, min(len(view), BLOCK))
            except TimeoutError:
                if time.monotonic() - heard > self._silence:
                    raise Failed(f"{self._offer.address} was silent for {self._silence:g} s") from None
                continue
            if not n:
                raise Failed("the other side closed the connection")
            yield view[:n]
            view, heard = view[n:], time.monotonic()


def _receive(sock: socket.socket, n: int) -> bytes:
    out = b""
    while len(out) < n:
        some = sock.recv(n - len(out))
        if not some:
            raise ConnectionError("the caller closed the connection")
        out += some
    return out


def _send(sock: socket.socket, head: bytes, runs: Iterator[Bytes]) -> None:
    """The head, and all bytes of all runs straight from where they are."""
    todo = deque([memoryview(head), *(run.data for run in runs)])
    while todo:
        sent = sock.sendmsg(list(islice(todo, _PIECES)))
        while todo and sent >= todo[0].nbytes:
            sent -= todo.popleft().nbytes
        if sent:
            todo[0] = todo[0][sent:]
