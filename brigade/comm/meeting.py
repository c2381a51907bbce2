"""How the ranks of several hosts find each other: every rank ends with one authenticated TCP connection to every other.

Rank r listens on its own address and calls all ranks below it. Each connection has a thread and a short deadline of its
own, so a client that is silent or speaks nonsense costs the others nothing.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from brigade.comm.group import PeerLost
from brigade.comm.handshake import MIN_SECRET, Differs, Hello, Refused, answer, call, welcome

Address = tuple[str, int]
Stopped = Callable[[], Iterable[int] | None]
"""Says who is to blame once a supervisor has stopped the generation; None until then."""


def never() -> None:
    """For a group that no supervisor stops."""


_HANDSHAKE_S = 2.0
_RETRY_S = 0.05
_MOST_STRANGERS = 64
"""Handshakes at a time."""


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on exactly this address. Port 0 takes a free one (`getsockname` tells)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_MOST_STRANGERS)
    except OSError as e:
        sock.close()
        raise OSError(e.errno, f"cannot listen on {host}:{port}: {e.strerror}") from e
    return sock


class Strangers:
    """Callers whose handshake is under way, each in a thread of its own. One more than there is room for ends the
    oldest: silent callers cannot keep out a rank. Safe from any thread."""

    def __init__(self) -> None:
        self._socks: dict[socket.socket, None] = {}
        """Oldest first."""
        self._lock = threading.Lock()

    def add(self, sock: socket.socket) -> None:
        with self._lock:
            if len(self._socks) >= _MOST_STRANGERS:
                oldest = next(iter(self._socks))
                del self._socks[oldest]
                end(oldest)
            self._socks[sock] = None

    def discard(self, sock: socket.socket) -> None:
        with self._lock:
            self._socks.pop(sock, None)

    def end(self) -> None:
        with self._lock:
            for sock in self._socks:
                end(sock)


def end(sock: socket.socket) -> None:
    """The thread that has it sees the end, and closes it."""
    with contextlib.suppress(OSError):  # it left by itself
        sock.shutdown(socket.SHUT_RDWR)


@dataclass
class _Meeting:
    me: Hello
    secret: bytes
    until: float
    arrived: "queue.Queue[tuple[int, socket.socket]]" = field(default_factory=queue.Queue)
    refused: "queue.Queue[ConnectionError]" = field(default_factory=queue.Queue)
    """Why this rank cannot go on: Refused, or PeerLost if it was left behind."""
    why: dict[int, str] = field(default_factory=dict)
    """The last trouble with each rank that was called."""
    over: threading.Event = field(default_factory=threading.Event)
    callers: Strangers = field(default_factory=Strangers)

    def hello(self) -> Hello:
        me = self.me
        return Hello(me.rank, me.size, me.generation, me.layout, os.urandom(32))

    def soon(self) -> float:
        return min(self.until, time.monotonic() + _HANDSHAKE_S)

    def call(self, rank: int, address: Address) -> None:
        """Call a rank until it answers."""
        while not self.over.is_set() and time.monotonic() < self.until:
            until = self.soon()
            try:
                sock = socket.create_connection(address, max(0.01, until - time.monotonic()))
            except OSError as e:
                self.why[rank] = f"{address[0]}:{address[1]}: {e}"
                time.sleep(_RETRY_S)
                continue
            if sock.getsockname() == sock.getpeername():
                # TCP connects a socket to itself if nobody listens and its own port is, by chance, the one it calls
                sock.close()
                continue
            try:
                theirs = call(sock, self.hello(), self.secret, until)
                if theirs.rank != rank:
                    raise Refused(f"{address[0]}:{address[1]}: rank {theirs.rank} answers, rank {rank} was called")
                self.arrived.put((rank, sock))
                return
            except Refused as e:
                sock.close()
                self.why[rank] = f"{address[0]}:{address[1]}: {e}"
                if not self.earlier(rank, e):
                    return
                time.sleep(_RETRY_S)
            except OSError as e:
                sock.close()
                self.why[rank] = f"{address[0]}:{address[1]}: {e}"
                time.sleep(_RETRY_S)

    def earlier(self, rank: int, error: Refused) -> bool:
        """Whether the other side is only late: still in an earlier meeting. If not, this meeting is over."""
        theirs = error.theirs.generation if isinstance(error, Differs) else self.me.generation
        if theirs > self.me.generation:
            self.refused.put(PeerLost((), f"rank {rank} is in generation {theirs}, this one in {self.me.generation}"))
        elif theirs == self.me.generation:
            self.refused.put(Refused(f"rank {rank}: {error}"))
        return theirs < self.me.generation

    def accept(self, listener: socket.socket) -> None:
        """Take callers until the meeting is over."""
        listener.settimeout(0.1)
        while not self.over.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # nobody called, the caller left again, or the meeting closed the socket
                continue
            self.callers.add(sock)
            threading.Thread(target=self.answer, args=(sock,), daemon=True).start()

    def answer(self, sock: socket.socket) -> None:
        try:
            until = self.soon()
            theirs = answer(sock, self.hello(), self.secret, until)
            if not self.me.rank < theirs.rank < self.me.size:
                raise Differs(f"it called; ranks {self.me.rank + 1} to {self.me.size - 1} may", theirs)
            welcome(sock, until)
            self.arrived.put((theirs.rank, sock))
        except Differs as e:
            sock.close()
            self.earlier(e.theirs.rank, e)
        except OSError:  # silent, gone, or not one of us: whoever does not know the secret ends nothing
            sock.close()
        finally:
            self.callers.discard(sock)


def meet(
    rank: int,
    addresses: Sequence[Address],
    listener: socket.socket,
    *,
    secret: bytes,
    layout: bytes,
    generation: int,
    deadline: float,
    stopped: Stopped = never,
) -> dict[int, socket.socket]:
    """A connection to every other rank. Takes `listener` (of `listen`) over and closes it.

    Blocks up to `deadline` seconds. Raises PeerLost, which names those who did not come, also when it was `stopped`,
    and at once if another rank is in a later generation; one in an earlier generation has yet to leave that meeting and
    is waited for. Raises Refused at once if a rank that knows the secret runs another version, layout or number of
    ranks (both values are in the message), or if a called rank has another secret.
    """
    if len(secret) < MIN_SECRET:
        raise ValueError(f"secret: needs at least {MIN_SECRET} bytes, not {len(secret)}")
    if len(layout) != 32:
        raise ValueError(f"layout: give a SHA-256 of 32 bytes, not {len(layout)}")
    size = len(addresses)
    meeting = _Meeting(Hello(rank, size, generation, layout, bytes(32)), secret, time.monotonic() + deadline)
    threads = [threading.Thread(target=meeting.accept, args=(listener,), daemon=True)]
    threads += [threading.Thread(target=meeting.call, args=(r, addresses[r]), daemon=True) for r in range(rank)]
    for thread in threads:
        thread.start()
    links: dict[int, socket.socket] = {}
    try:
        _gather(meeting, links, stopped)
    except BaseException:
        for sock in links.values():
            sock.close()
        raise
    finally:
        meeting.over.set()
        threads[0].join(1)
        listener.close()
    return links


def _gather(meeting: _Meeting, links: dict[int, socket.socket], stopped: Stopped) -> None:
    others = set(range(meeting.me.size)) - {meeting.me.rank}
    while others - set(links):
        if (culprits := stopped()) is not None:
            raise PeerLost(culprits, f"the meeting of generation {meeting.me.generation} was stopped")
        with contextlib.suppress(queue.Empty):
            raise meeting.refused.get_nowait()
        if time.monotonic() >= meeting.until:
            missing = others - set(links)
            why = "; ".join(meeting.why[r] for r in sorted(missing) if r in meeting.why)
            raise PeerLost(missing, f"did not come to the meeting of generation {meeting.me.generation} ({why})")
        with contextlib.suppress(queue.Empty):
            rank, sock = meeting.arrived.get(timeout=0.02)
            if rank in links:  # it called again because it did not hear our welcome in time
                links[rank].close()
            links[rank] = sock
