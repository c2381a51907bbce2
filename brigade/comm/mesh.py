"""A group over TCP: every rank has a connection to every other. Carries byte buffers on numbered channels.

Bytes move while a rank is inside a call: `post` sends what the kernel takes, `collect` sends the rest and receives. One
thread, no locks. A rank that finds another lost tells all the rest: all name the same culprit, and nobody waits longer.
"""

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from brigade.comm.group import PeerLost, checked, checked_deadline
from brigade.comm.meeting import Address, Stopped, meet, never

Bytes: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct("!BQ")
MAX_FRAME = 1 << 34
_SHARE, _ALL_TO_ALL, _LATE, _LOST = 0, 1, 254, 255
FIRST_FREE_CHANNEL = 8
_OF_DEADLINE = 0.75
_LOOK_S = 0.05
"""Longest wait between two looks at whether the generation was stopped."""
_MOST_BUFFERS = 64
"""Buffers of one sendmsg; IOV_MAX is 1024."""


class _Link:
    """One connection: what is still to be sent, and what came, by channel."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.out: deque[memoryview] = deque()
        self.came: dict[int, deque[bytearray]] = {}
        self.gone = ""
        self._head = bytearray(_HEADER.size)
        self._channel = 0
        self._body: bytearray | None = None
        self._got = 0

    def send(self) -> None:
        try:
            while self.out:
                n = self.sock.sendmsg([self.out[i] for i in range(min(len(self.out), _MOST_BUFFERS))])
                while self.out and n >= len(self.out[0]):
                    n -= len(self.out.popleft())
                if n:
                    self.out[0] = self.out[0][n:]
        except BlockingIOError:
            pass
        except OSError as e:
            self.out.clear()
            self.receive()  # it may have said why before it went
            self.gone = self.gone or f"its connection broke: {e}"

    def message(self, channel: int, data: bytes) -> None:
        self.out.append(memoryview(_HEADER.pack(channel, len(data)) + data))
        self.send()

    def receive(self) -> None:
        """All that is here."""
        try:
            while True:
                into = memoryview(self._head if self._body is None else self._body)[self._got :]
                n = self.sock.recv_into(into) if into else 0
                if into and not n:
                    self.gone = self.gone or "it closed its connection"
                    return
                self._got += n
                if self._got == (_HEADER.size if self._body is None else len(self._body)):
                    self._next()
                if self.gone:
                    return
        except BlockingIOError:
            pass
        except OSError as e:
            self.gone = f"its connection broke: {e}"

    def _next(self) -> None:
        self._got = 0
        if self._body is not None:
            self.came.setdefault(self._channel, deque()).append(self._body)
            self._body = None
            return
        self._channel, length = _HEADER.unpack(self._head)
        if length > MAX_FRAME:
            self.gone = f"it announced {length} bytes; {MAX_FRAME} is the limit"
            return
        self._body = bytearray(length)
        if not length:
            self._next()


def patience(deadline: float) -> float:
    """Seconds that a wait may take; the rest of the deadline is for finding out who is lost."""
    return _OF_DEADLINE * deadline


class Mesh:
    """A Group. Made anew, with another generation, after a PeerLost."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[Address],
        listener: socket.socket,
        *,
        secret: bytes,
        layout: bytes,
        generation: int,
        deadline: float,
        stopped: Stopped = never,
    ) -> None:
        """Meets all ranks (`brigade.comm.meeting.meet` says how and what it raises).

        `stopped` is asked in long waits, many times a second: the culprits once the supervisor has stopped this
        generation, else None.
        """
        if not 0 <= rank < len(addresses):
            raise ValueError(f"rank: must be 0 to {len(addresses) - 1}, not {rank}")
        self.rank, self.size, self.deadline = rank, len(addresses), checked_deadline(deadline)
        self.patience = patience(self.deadline)
        self._stopped = stopped
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._culprits: tuple[int, ...] = ()
        self._error: PeerLost | None = None
        self._links: dict[int, _Link] = {}
        try:
            socks = meet(
                rank,
                addresses,
                listener,
                secret=secret,
                layout=layout,
                generation=generation,
                deadline=deadline,
                stopped=stopped,
            )
        except BaseException:
            self.close()
            raise
        self._links = {r: _Link(socks[r]) for r in sorted(socks)}
        self._of_file = {link.sock.fileno(): link for link in self._links.values()}
        self.share(())

    def share(self, ints: Sequence[int]) -> list[tuple[int, ...]]:
        said = checked(ints)
        data = struct.pack(f"!{len(said)}q", *said)
        for r in self._links:
            self.post(r, _SHARE, data)
        came = self.collect(_SHARE)
        out = {r: struct.unpack(f"!{len(b) // 8}q", b) for r, b in came.items()}
        return [said if r == self.rank else tuple(out[r]) for r in range(self.size)]

    def all_to_all(self, buffers: Sequence[Bytes]) -> list[Bytes]:
        """Give `buffers[r]` to rank r; what every rank gave to this one, in rank order. Lengths may differ and be 0."""
        if len(buffers) != self.size:
            raise ValueError(f"all_to_all: give {self.size} buffers, not {len(buffers)}")
        for r in self._links:
            self.post(r, _ALL_TO_ALL, buffers[r])
        came = self.collect(_ALL_TO_ALL)
        return [buffers[r] if r == self.rank else came[r] for r in range(self.size)]

    def post(self, rank: int, channel: int, *buffers: Bytes) -> None:
        """Start sending one message; `buffers` must stay as they are until this channel's `collect` returns."""
        views = [v for v in (memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes) if len(v)]
        link = self._links[rank]
        link.out.append(memoryview(_HEADER.pack(channel, sum(len(v) for v in views))))
        link.out.extend(views)
        link.send()

    def collect(self, channel: int, ranks: Iterable[int] | None = None) -> dict[int, bytearray]:
        """The next message on this channel of each of `ranks` (all others if None), once all own bytes are sent, too.

        Raises PeerLost at the deadline, when a connection ends, or when `stop` was called.
        """
        wanted = tuple(self._links if ranks is None else ranks)
        until = time.monotonic() + self.patience
        while waiting := [r for r in wanted if not self._links[r].came.get(channel)] or self._unsent():
            self._check()
            left = until - time.monotonic()
            if left <= 0:
                raise self.late(waiting)
            self._pump(left)
        return {r: self._links[r].came[channel].popleft() for r in wanted}

    def stop(self, ranks: Iterable[int] = ()) -> None:
        """From any thread: end the wait that is under way, and all later ones. `ranks` are the culprits."""
        self._culprits = tuple(ranks)
        os.eventfd_write(self._stop, 1)

    def late(self, ranks: Iterable[int]) -> PeerLost:
        """The error to raise when `patience` is over and `ranks` have not arrived: who of all is really lost.

        A rank that did not arrive may itself wait for another. So each says for whom it waits; whoever says so is well,
        and the lost are those that are waited for and say nothing until the deadline. When all but one have spoken it
        is that one: nobody else is left whom it could wait for.
        """
        waited_for, spoke = set(ranks), {self.rank}
        for link in self._links.values():
            link.message(_LATE, struct.pack(f"!{len(waited_for)}H", *waited_for))
        until = time.monotonic() + self.deadline - self.patience
        suspects = waited_for
        while (left := until - time.monotonic()) > 0 and len(spoke) < self.size - 1:
            try:
                self._pump(left)
                self._check()
            except PeerLost as e:
                return e
            for rank, link in self._links.items():
                if said := link.came.get(_LATE):
                    waited_for |= set(struct.unpack(f"!{len(said[0]) // 2}H", said[0]))
                    spoke.add(rank)
            suspects = waited_for - spoke
        return self.lost(suspects or ranks, f"did not arrive within {self.deadline:g} s")

    def look(self) -> None:
        """Raises PeerLost if anybody is known to be lost by now. Does not wait."""
        self._pump(0)
        self._check()

    def close(self) -> None:
        for link in self._links.values():
            link.sock.close()
        if self._stop >= 0:
            os.close(self._stop)
            self._stop = -1

    def _unsent(self) -> list[int]:
        return [r for r, link in self._links.items() if link.out]

    def _pump(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        for link in self._links.values():
            if not link.gone:
                poll.register(link.sock, select.POLLIN | (select.POLLOUT if link.out else 0))
        ready = poll.poll(1000 * min(seconds, _LOOK_S))
        for file, events in ready:
            if file == self._stop:
                raise self.lost(self._culprits, "the group was stopped")
            link = self._of_file[file]
            if events & select.POLLOUT:
                link.send()
            if events & ~select.POLLOUT:
                link.receive()
        if not ready and (culprits := self._stopped()) is not None:
            raise self.lost(culprits, "the group was stopped")

    def _check(self) -> None:
        """Raises PeerLost if anybody is known to be lost. What others say comes first: they saw it before us."""
        if self._error is not None:
            raise PeerLost(self._error.ranks, self._error.why)
        for rank, link in self._links.items():
            if told := link.came.get(_LOST):
                culprits = struct.unpack(f"!{len(told[0]) // 2}H", told[0])
                raise self.lost(culprits, f"lost, as rank {rank} tells")
        gone = {r: link.gone for r, link in self._links.items() if link.gone}
        if gone:
            raise self.lost(gone, next(iter(gone.values())))

    def lost(self, ranks: Iterable[int], why: str) -> PeerLost:
        """The error to raise; all others are told first, so that they raise it, too."""
        error = self._error = PeerLost(ranks, why)
        for link in self._links.values():
            if not link.gone:
                link.message(_LOST, struct.pack(f"!{len(error.ranks)}H", *error.ranks))
        return error
