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
from dataclasses import dataclass

VERSION = 1
MIN_SECRET = 16
"""Bytes: whoever can connect is given an HMAC, so a short secret could be guessed at leisure."""
_MAGIC = b"BRIGADE\0"
_HELLO = struct.Struct("!8sHHHI32s32s")
_WELCOME = b"\x01"


class Refused(ConnectionError):
    """The other side is not one of us, or runs something else."""


class Differs(Refused):
    """The other side knows the secret, but runs something else."""


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


def call(sock: socket.socket, mine: Hello, secret: bytes, until: float) -> Hello:
    """The side that connected. Raises Refused, or OSError if the other side goes or is silent until then."""
    sent = mine.pack()
    _send(sock, sent, until)
    got = _receive(sock, _HELLO.size, until)
    theirs = Hello.unpack(got)
    _check_proof(_receive(sock, 32, until), _proof(secret, b"answer", sent, got))
    _send(sock, _proof(secret, b"call", sent, got), until)
    if wrong := mine.differences(theirs):
        raise Differs(f"rank {theirs.rank}: {wrong}")
    _receive(sock, 1, until)
    return theirs


def answer(sock: socket.socket, mine: Hello, secret: bytes, until: float) -> Hello:
    """The side that listened. Raises as `call` does."""
    got = _receive(sock, _HELLO.size, until)
    theirs = Hello.unpack(got)
    sent = mine.pack()
    _send(sock, sent + _proof(secret, b"answer", got, sent), until)
    _check_proof(_receive(sock, 32, until), _proof(secret, b"call", got, sent))
    if wrong := mine.differences(theirs):
        raise Differs(f"rank {theirs.rank}: {wrong}")
    return theirs


def welcome(sock: socket.socket, until: float) -> None:
    """The last byte of `answer`'s side, once the caller has its place."""
    _send(sock, _WELCOME, until)


def _proof(secret: bytes, label: bytes, caller: bytes, answerer: bytes) -> bytes:
    return hmac.new(secret, label + caller + answerer, hashlib.sha256).digest()


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
