"""KV rows over TCP, for ranks that share no memory: authenticated by the fleet's secret, no pickle, bounded frames.

    caller                                  the rank that offers
      handshake (brigade.comm.handshake)
      request: offer, layer           ──►
                                      ◄──   answer: bytes that follow, then the rows; 0 bytes: it is not offered
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
from collections.abc import Iterator
from itertools import islice

from brigade.comm.handshake import Hello, Refused, answer, call, welcome
from brigade.comm.kv.link import Failed, Offers
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes
from brigade.comm.meeting import listen

log = logging.getLogger("brigade.kv")

_REQUEST = struct.Struct("!QI")
_ANSWER = struct.Struct("!Q")
_CALL_S = 5.0
"""Seconds for a connection and its handshake."""
_MAX_CALLERS = 64
_PIECES = 64
"""Runs that one system call sends."""


def _hello(n_layers: int, row_bytes: int) -> Hello:
    layout = hashlib.sha256(f"kv {n_layers} {row_bytes}".encode()).digest()
    return Hello(rank=0, size=0, generation=0, layout=layout, nonce=os.urandom(32))


class KvServer:
    """Gives out what a rank offers. Threads of its own; `close` ends them."""

    def __init__(self, offers: Offers, host: str, secret: bytes, deadline: float) -> None:
        """`deadline`: seconds that a caller may let a send wait. Raises OSError if nobody can listen there."""
        self._offers, self._secret, self._deadline = offers, secret, deadline
        self._listener = listen(host)
        port = self._listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._callers: set[socket.socket] = set()
        self._lock, self._closed = threading.Lock(), False
        threading.Thread(target=self._accept, name="kv-server", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # it wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            callers = list(self._callers)
        for sock in callers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                full = len(self._callers) >= _MAX_CALLERS
                if not full:
                    self._callers.add(sock)
            if full:
                sock.close()  # the caller's transfer fails, and its rank computes the prompt itself
                continue
            threading.Thread(target=self._serve, args=(sock,), name="kv-caller", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        rows = self._offers.rows
        try:
            with sock:
                until = time.monotonic() + _CALL_S
                answer(sock, _hello(rows.n_layers, rows.row_bytes), self._secret, until)
                welcome(sock, until)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(self._deadline)
                while request := _receive(sock, _REQUEST.size):
                    self._answer(sock, *_REQUEST.unpack(request))
        except (Refused, OSError, ValueError) as e:
            log.info("a caller for KV rows has gone: %s", e)
        finally:
            with self._lock:
                self._callers.discard(sock)

    def _answer(self, sock: socket.socket, rid: int, layer: int) -> None:
        offer, rows = self._offers.get(rid), self._offers.rows
        if offer is None or layer >= rows.n_layers:
            sock.sendall(_ANSWER.pack(0))
            return
        sock.sendall(_ANSWER.pack((offer.end - offer.start) * rows.row_bytes))
        runs = rows.runs(layer, offer.pages, offer.start, offer.end)
        while some := deque(islice(runs, _PIECES)):
            _send(sock, some)


class Caller:
    """Opens offers of other ranks over TCP."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @contextlib.contextmanager
    def open(self, offer: Offer, until: float) -> Iterator["_Connected"]:
        """The source of an offer. Raises Failed, OSError."""
        host, _, port = offer.address.rpartition(":")
        if not host:
            raise Failed("the offer names no address")
        left = min(until - time.monotonic(), _CALL_S)
        if left <= 0:
            raise TimeoutError("no time is left to connect")
        with socket.create_connection((host, int(port)), left) as sock:
            call(sock, _hello(len(offer.checks), offer.row_bytes), self._secret, time.monotonic() + left)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield _Connected(sock, offer)


class _Connected:
    def __init__(self, sock: socket.socket, offer: Offer) -> None:
        self._sock, self._offer, self._asked = sock, offer, 0

    def read(self, layer: int, runs: Iterator[Bytes], until: float) -> Iterator[Bytes]:
        o = self._offer
        want = (o.end - o.start) * o.row_bytes
        self._patience(until)
        self._sock.sendall(_REQUEST.pack(o.rid, layer))
        (n,) = _ANSWER.unpack(_receive(self._sock, _ANSWER.size) or _ANSWER.pack(0))
        if n != want:
            raise Failed("it is not offered any more" if not n else f"{n} bytes come where {want} are wanted")
        for run in runs:
            view = run.data
            while view:
                self._patience(until)
                got = self._sock.recv_into(view)
                if not got:
                    raise Failed("the other side closed the connection")
                view = view[got:]
            yield run

    def _patience(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side is silent")
        self._sock.settimeout(left)


def _receive(sock: socket.socket, n: int) -> bytes:
    """n bytes, or none if the other side has closed the connection before the first."""
    out = b""
    while len(out) < n:
        some = sock.recv(n - len(out))
        if not some:
            if out:
                raise ConnectionError("the other side closed the connection in the middle of a message")
            return b""
        out += some
    return out


def _send(sock: socket.socket, runs: deque[Bytes]) -> None:
    """All bytes of all runs, straight from where they are."""
    while runs:
        sent = sock.sendmsg([run.data for run in runs])
        while runs and sent >= runs[0].size:
            sent -= runs.popleft().size
        if runs:
            runs[0] = runs[0][sent:]
