"""KV rows over NIXL, for ranks of different hosts: RDMA where there is any, TCP where not. Alone in importing it.

What is finished is told over TCP as for the other links; rows are read by the rank that wants them, out of the other
one's registered memory. Three things about NIXL are dealt with here:

- Its progress thread, without which nobody could read this rank's memory while it computes, spins unless it is told to
  sleep. Only the bindings below its Python interface can tell it.
- A transfer whose other side falls silent never ends and never fails. So each one has a deadline of ours.
- Nobody knows whether a transfer that was given up still writes. So rows are read into memory of their own, and copied
  into pages when the transfer has ended; the memory of one that was given up is not used again.

Whoever reaches the ports that NIXL opens can speak to it, and it asks for no secret: the network must be one's own.
"""

import contextlib
import importlib.util
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from brigade.comm.kv.link import Failed, GoOn
from brigade.comm.kv.offer import Offer, Registered
from brigade.comm.kv.offers import PIECE
from brigade.comm.kv.rows import Bytes, CacheShape, Fast, Piece, copy_checked
from brigade.comm.kv.tcp import Caller, Connected

INSTALL = "install it with: pip install 'brigade[nixl]'"
_SLEEP_US = 100
"""Between two looks of the progress thread: 1 to 2 % of a core."""
_POLL_S = 0.0001
_MOST_LOST = 32
"""Transfers that may be given up, with 8 MB of memory each, before this rank takes no more."""


def installed() -> bool:
    """Whether NIXL is there. Loads nothing."""
    return importlib.util.find_spec("nixl_cu12") is not None


class Nixl:
    """This rank's end. One for each process; its methods are safe from any thread."""

    @classmethod
    def start(cls, caller: Caller, fast: Fast | None = None) -> "Nixl":
        """`fast`: copies rows, where it can. Raises ValueError if NIXL is not installed or cannot start."""
        try:
            import nixl_cu12._bindings as bindings
        except ImportError as e:
            raise ValueError(f"link nixl: {e}; {INSTALL}") from e
        return cls(caller, bindings, fast)

    def __init__(self, caller: Caller, bindings: Any, fast: Fast | None = None) -> None:
        """`bindings`: the module. Raises ValueError if NIXL cannot start."""
        n = self._nixl = bindings
        self.fast = fast
        self._errors = tuple(e for e in vars(n).values() if isinstance(e, type) and issubclass(e, Exception))
        config = n.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay, config.syncMode = _SLEEP_US, n.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = n.nixlAgent(f"brigade-{uuid.uuid4()}", config)
            self._agent.createBackend("UCX", {})
        except self._errors as e:
            raise ValueError(f"link nixl: NIXL cannot start here: {e}") from e
        self._caller = caller
        self._lock = threading.Lock()
        self._peers: dict[bytes, str] = {}
        """Other ranks by what they say of themselves."""
        self._idle: list[Bytes] = []
        """Registered memory that rows can be read into."""
        self._left: list[tuple[Any, Bytes]] = []
        """Transfers that nobody waits for any more, and theirs: it is idle when they have ended."""
        self._lost: list[Bytes] = []
        """That of transfers which did not end in time, or went wrong: it may be written for ever."""

    def register(self, memory: Bytes) -> Registered:
        """Let others read this memory. Raises ValueError."""
        try:
            self._register(memory)
            return Registered(self._agent.getLocalMD(), memory.ctypes.data)
        except self._errors as e:
            raise ValueError(f"link nixl: a KV cache of {memory.size} bytes cannot be registered: {e}") from e

    @contextlib.contextmanager
    def open(self, offer: Offer, have: Sequence[int]) -> Iterator["_Remote"]:
        """The source of an offer. Raises Failed, OSError."""
        if offer.registered is None:
            raise Failed("its rows cannot be read over NIXL")
        with self._caller.connect(offer, have, with_rows=False) as sock:
            yield _Remote(sock, offer, self._caller.silence, self)

    def read(self, registered: Registered, spans: list[tuple[int, int]], seconds: float, go_on: GoOn) -> Bytes:
        """What lies there, (first byte, number of bytes) each, one after the other: at the beginning of memory that is
        to be given back with `done`. Raises Failed, and what `go_on` does."""
        landing, until = self._landing(sum(n for _, n in spans)), time.monotonic() + seconds
        try:
            transfer = self._begin(registered, spans, landing)
            while (state := self._agent.getXferStatus(transfer)) == self._nixl.NIXL_IN_PROG:
                if time.monotonic() > until:
                    raise self._give_up(registered, landing, "a transfer did not end in time")
                self._wait(transfer, landing, go_on)
            self._agent.releaseXferReq(transfer)
        except self._errors as e:
            raise self._give_up(registered, landing, str(e)) from e
        if state != self._nixl.NIXL_SUCCESS:
            raise self._give_up(registered, landing, f"a transfer ended with {state}")
        return landing

    def done(self, landing: Bytes) -> None:
        """What was read has been copied."""
        with self._lock:
            self._idle.append(landing)

    def _begin(self, registered: Registered, spans: list[tuple[int, int]], landing: Bytes) -> Any:
        n, here, there = self._nixl, list[tuple[int, int, int]](), list[tuple[int, int, int]]()
        at = landing.ctypes.data
        for first, size in spans:
            there.append((registered.base + first, size, 0))
            here.append((at, size, 0))
            at += size
        lists = [n.nixlXferDList(n.DRAM_SEG, some) for some in (here, there)]
        transfer = self._agent.createXferReq(n.NIXL_READ, *lists, self._peer(registered), "", [])
        self._agent.postXferReq(transfer, "")
        return transfer

    def _wait(self, transfer: Any, landing: Bytes, go_on: GoOn) -> None:
        try:
            go_on()
        except BaseException:
            with self._lock:
                self._left.append((transfer, landing))
            raise
        time.sleep(_POLL_S)

    def _give_up(self, registered: Registered, landing: Bytes, why: str) -> Failed:
        """Connect anew next time, with other memory."""
        with self._lock, contextlib.suppress(*self._errors):
            self._lost.append(landing)
            if name := self._peers.pop(registered.agent, None):
                self._agent.invalidateRemoteMD(name)
        return Failed(f"NIXL: {why}")

    def _peer(self, registered: Registered) -> str:
        with self._lock:
            if (name := self._peers.get(registered.agent)) is None:
                name = self._peers[registered.agent] = self._agent.loadRemoteMD(registered.agent).decode()
        return name

    def _landing(self, size: int) -> Bytes:
        with self._lock:
            self._collect()
            if len(self._lost) + len(self._left) >= _MOST_LOST:
                raise Failed(
                    f"{len(self._lost) + len(self._left)} NIXL transfers never ended; this rank begins no more"
                )
            fitting = [i for i, landing in enumerate(self._idle) if landing.size >= size]
            if fitting:
                return self._idle.pop(fitting[0])
        landing = np.zeros(max(size, PIECE), np.uint8)
        try:
            self._register(landing)
        except self._errors as e:
            raise Failed(f"NIXL: {landing.size} bytes cannot be registered: {e}") from e
        return landing

    def _collect(self) -> None:
        """Take back the memory of transfers that have ended after all."""
        left, self._left = self._left, []
        for transfer, landing in left:
            try:
                if self._agent.getXferStatus(transfer) == self._nixl.NIXL_IN_PROG:
                    self._left.append((transfer, landing))
                else:
                    self._agent.releaseXferReq(transfer)
                    self._idle.append(landing)
            except self._errors:
                self._lost.append(landing)

    def _register(self, memory: Bytes) -> None:
        n = self._nixl
        self._agent.registerMem(n.nixlRegDList(n.DRAM_SEG, [(memory.ctypes.data, memory.size, 0, "")]), [])


class _Remote(Connected):
    with_rows = False

    def __init__(self, sock: Any, offer: Offer, silence: float, nixl: Nixl) -> None:
        super().__init__(sock, offer, silence)
        self._nixl, self._shape = nixl, CacheShape(offer.n_layers, offer.n_pages, offer.page, offer.row_bytes)

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        assert self._offer.registered is not None
        landing = self._nixl.read(self._offer.registered, [*piece.spans(self._shape)], self._silence, go_on)
        try:
            return copy_checked([landing], runs, self._nixl.fast)  # as much of it as there are runs
        finally:
            self._nixl.done(landing)
