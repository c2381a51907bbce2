"""How two ranks make sure of each other over TCP: a shared secret, and agreement on what they are about to run.

    caller                                      answerer
      hello (with a nonce)              ──►
                                        ◄──     hello (with a nonce), HMAC("answer", both hellos)
      HMAC("call", both hellos)         ──►
                                        ◄──     one byte: welcome

Each side proves that it knows the secret over a nonce the other chose, under a label of its own, so nothing can be
replayed or reflected. The layout of a hello never changes between versions. Fields are compared only after the proof:
whoever does not know the secret can neither stop a start nor learn why it was turned away. Bytes after the handshake
are not sealed: the network between ranks must be one's own.
"""

import hashlib
import hmac
import socket
import struct
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

VERSION = 1
MIN_SECRET = 16
"""Bytes: whoever can connect is given an HMAC, so a short secret could be guessed at leisure."""
_MAGIC = b"BRIGADE\0"
_HELLO = struct.Struct("!8sHHHI32s32s")
WELCOME = b"\x01"
PROOF_SIZE = 32
"""Bytes of an HMAC-SHA256."""


class Refused(ConnectionError):
    """The other side is not one of us, or runs something else."""


class Differs(Refused):
    """The other side knows the secret, but runs something else."""

    def __init__(self, message: str, theirs: "Hello") -> None:
        super().__init__(message)
        self.theirs = theirs


@dataclass(frozen=True)
class Hello:
    """Who speaks, and what it is about to run. `layout` is a SHA-256 over all that ranks must agree on."""

    rank: int
    size: int
    generation: int
    layout: bytes
    nonce: bytes
    version: int = VERSION

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, self.version, self.rank, self.size, self.generation, self.layout, self.nonce)

    @classmethod
    def unpack(cls, data: bytes) -> "Hello":
        magic, version, rank, size, generation, layout, nonce = _HELLO.unpack(data)
        if magic != _MAGIC:
            raise Refused("not a rank: its first bytes are not those of a hello")
        return cls(rank, size, generation, layout, nonce, version)

    def differences(self, other: "Hello") -> str:
        """What the two do not agree on, with both values; empty if they agree."""
        return "; ".join(
            f"{name}: {a} here, {b} there"
            for name, a, b in (
                ("protocol version", self.version, other.version),
                ("ranks", self.size, other.size),
                ("generation", self.generation, other.generation),
                ("layout", self.layout.hex()[:16], other.layout.hex()[:16]),
            )
            if a != b
        )


Steps: TypeAlias = Generator[tuple[bytes, int], bytes, Hello]
"""A side of the handshake without its socket: yields (bytes to send, number of bytes to receive then)."""


def calling(mine: Hello, secret: bytes) -> Steps:
    """The side that connected: ends with the other side's hello, once that side has said welcome. Raises Refused."""
    sent = mine.pack()
    got = yield sent, _HELLO.size
    theirs = Hello.unpack(got)
    _check_proof((yield b"", PROOF_SIZE), _proof(secret, b"answer", sent, got))
    yield _proof(secret, b"call", sent, got), 0
    _check_same(mine, theirs)
    yield b"", len(WELCOME)
    return theirs


def answering(mine: Hello, secret: bytes) -> Steps:
    """The side that listened: ends with the caller's hello, before the welcome. Raises Refused."""
    got = yield b"", _HELLO.size
    theirs = Hello.unpack(got)
    sent = mine.pack()
    proof = yield sent + _proof(secret, b"answer", got, sent), PROOF_SIZE
    _check_proof(proof, _proof(secret, b"call", got, sent))
    _check_same(mine, theirs)
    return theirs


def call(sock: socket.socket, mine: Hello, secret: bytes, until: float) -> Hello:
    """`calling` over a socket. Raises Refused, or OSError if the other side goes or is silent until then."""
    return _over(sock, calling(mine, secret), until)


def answer(sock: socket.socket, mine: Hello, secret: bytes, until: float) -> Hello:
    """`answering` over a socket. Raises as `call` does."""
    return _over(sock, answering(mine, secret), until)


def _over(sock: socket.socket, steps: Steps, until: float) -> Hello:
    try:
        data, n = next(steps)
        while True:
            if data:
                _send(sock, data, until)
            data, n = steps.send(_receive(sock, n, until))
    except StopIteration as end:
        theirs: Hello = end.value
        return theirs


def welcome(sock: socket.socket, until: float) -> None:
    """The last byte of `answer`'s side, once the caller has its place."""
    _send(sock, WELCOME, until)


def _proof(secret: bytes, label: bytes, caller: bytes, answerer: bytes) -> bytes:
    return hmac.new(secret, label + caller + answerer, hashlib.sha256).digest()


def _check_same(mine: Hello, theirs: Hello) -> None:
    if wrong := mine.differences(theirs):
        raise Differs(wrong, theirs)


def _check_proof(got: bytes, want: bytes) -> None:
    if not hmac.compare_digest(got, want):
        raise Refused("the other side has another secret")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the other side is silent")
    return left


def _send(sock: socket.socket, data: bytes, until: float) -> None:
    sock.settimeout(_left(until))
    sock.sendall(data)


def _receive(sock: socket.socket, n: int, until: float) -> bytes:
    out = b""
    while len(out) < n:
        sock.settimeout(_left(until))
        some = sock.recv(n - len(out))
        if not some:
            raise ConnectionError("the other side closed the connection")
        out += some
    return out
