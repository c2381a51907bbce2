"""One anonymous piece of memory through which the ranks of a host meet. Imports no torch: the supervisor creates it.

1. The supervisor calls `Segment.create`; children inherit `fd` (`pass_fds`) and call `Segment.attach(fd)`.
2. Every rank posts flags that carry (generation, sequence) after its data; readers wait for the flags they need.
3. When a rank is lost the supervisor calls `stop(generation, ranks)`: every wait of that generation ends at once.
4. Ranks form the next generation on the same segment; flags of older generations count for nothing.

The file has no name, so nothing is left behind when the last process ends. It is sparse: its size is the worst case,
its cost the pages that were touched.
"""

import ctypes
import mmap
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from brigade.comm.group import MAX_SHARED, PeerLost

MAGIC = int.from_bytes(b"brigade1", "little")
FIRST_GENERATION = 1
MAX_GENERATION = (1 << 16) - 1
_SEQUENCE_BITS = 48
_LINE = 64
"""Bytes of a cache line: each flag has its own, so that ranks do not slow each other down."""
_PAGE = 4096
_SPINS = 40
_SLEEP_NS = 20_000_000
"""Longest sleep between two looks at the clock and at the stop word."""

_MACHINE = platform.machine()
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(_MACHINE)
_STORES_IN_ORDER = _MACHINE == "x86_64"
_WAIT, _WAKE, _ALL = 0, 1, (1 << 31) - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


_NAP = _Timespec(0, _SLEEP_NS)
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
    *(ctypes.POINTER(_Timespec), ctypes.c_void_p, ctypes.c_uint32),
)


class Flag(IntEnum):
    """What a rank announces. Lanes 0 and 1 follow each other."""

    SHARE = 0
    DISPATCH = 1
    COMBINE = 3


_N_FLAGS = 5
MAX_PARTS = 512
"""Into how many parts a rank's tokens may be cut: one for each rank of the unit when it receives for its host."""
_N_CULPRITS = 64
"""Most ranks of one host: the supervisor's list of lost ranks is one word."""


@dataclass(frozen=True)
class Shape:
    """What a segment has room for: tokens of one rank in one lane, width in elements, slots of a token."""

    n_ranks: int
    max_tokens: int
    width: int
    k: int

    def __post_init__(self) -> None:
        for name in ("n_ranks", "max_tokens", "width", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.n_ranks > _N_CULPRITS:
            raise ValueError(f"n_ranks: one host takes up to {_N_CULPRITS}, not {self.n_ranks}")

    # Offsets in bytes. Order: header, flags, shared integers, then per rank and lane a dispatch and a combine region.

    def flag(self, rank: int, which: int) -> int:
        return _PAGE + (rank * _N_FLAGS + which) * _LINE

    def shared(self, rank: int, parity: int) -> int:
        return self._shared_at + (2 * rank + parity) * _SHARE_BYTES

    def slots(self, rank: int, lane: int) -> int:
        """Dispatch region: where each part's tokens end, [MAX_PARTS] int64, then slots [max_tokens, k] int32."""
        return self._lanes_at + (2 * rank + lane) * self._lane_bytes

    def rows(self, rank: int, lane: int) -> int:
        """Dispatch region: rows [max_tokens] of up to `row_bytes` bytes."""
        return self.slots(rank, lane) + self._slots_bytes

    def starts(self, rank: int, lane: int) -> int:
        """Combine region: where the results of each part and source start, [MAX_PARTS, n_ranks] int64."""
        return self.rows(rank, lane) + self._rows_bytes

    def results(self, rank: int, lane: int) -> int:
        """Combine region: results [n_ranks * max_tokens * k, width] float32."""
        return self.starts(rank, lane) + _up(8 * MAX_PARTS * self.n_ranks)

    @property
    def size(self) -> int:
        return self.slots(self.n_ranks, 0)

    @property
    def _shared_at(self) -> int:
        return _PAGE + _up(self.n_ranks * _N_FLAGS * _LINE)

    @property
    def _lanes_at(self) -> int:
        return self._shared_at + _up(2 * self.n_ranks * _SHARE_BYTES)

    @property
    def _slots_bytes(self) -> int:
        return _up(8 * MAX_PARTS + 4 * self.max_tokens * self.k)

    @property
    def row_bytes(self) -> int:
        """Room of a row: 4 bytes an element, which every wire format needs at most from two elements on."""
        return 4 * self.width

    @property
    def _rows_bytes(self) -> int:
        return _up(self.max_tokens * self.row_bytes)

    @property
    def _lane_bytes(self) -> int:
        results = _up(4 * self.n_ranks * self.max_tokens * self.k * self.width)
        return self._slots_bytes + self._rows_bytes + _up(8 * MAX_PARTS * self.n_ranks) + results


_SHARE_BYTES = _LINE + 8 * MAX_SHARED


def _up(n: int) -> int:
    return -(-n // _PAGE) * _PAGE


# Words of the header
_STOPPED, _CULPRITS, _FENCE = 8, 9, 16


class Segment:
    """The memory, its flags and the waiting. Which bytes mean what beyond that is the exchange's business."""

    def __init__(self, fd: int, shape: Shape) -> None:
        if _SYS_FUTEX is None:
            raise OSError(f"shared memory between ranks is not known to work on {_MACHINE}: choose another exchange")
        self.fd, self.shape = fd, shape
        self.memory = mmap.mmap(fd, shape.size)
        self._words = memoryview(self.memory).cast("Q")
        self._ints = memoryview(self.memory).cast("q")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    @classmethod
    def create(cls, n_ranks: int, max_tokens: int, width: int, k: int) -> "Segment":
        """For the supervisor. `max_tokens` per rank and lane. Generation 1 is the first that can be formed."""
        shape = Shape(n_ranks, max_tokens, width, k)
        fd = os.memfd_create("brigade-ranks", os.MFD_CLOEXEC)
        os.ftruncate(fd, shape.size)
        segment = cls(fd, shape)
        for i, word in enumerate((MAGIC, n_ranks, max_tokens, width, k)):
            segment._words[i] = word
        return segment

    @classmethod
    def attach(cls, fd: int) -> "Segment":
        """For a rank that inherited `fd`. Raises ValueError if this is no segment of this version."""
        with mmap.mmap(fd, _PAGE) as head:
            words = [int.from_bytes(head[8 * i : 8 * i + 8], "little") for i in range(5)]
        if words[0] != MAGIC:
            raise ValueError(f"fd {fd}: not a segment of this version ({words[0]:#x}, expected {MAGIC:#x})")
        return cls(fd, Shape(*words[1:]))

    def close(self) -> None:
        """Close the file; the memory goes when its last view goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def stopped(self) -> int:
        """The newest generation that was stopped; 0 at the start."""
        return self._words[_STOPPED]

    def stop(self, generation: int, ranks: Iterable[int] = ()) -> None:
        """For the supervisor alone: end all waits of this and older generations now. `ranks` are the culprits."""
        if not self.stopped <= generation <= MAX_GENERATION:
            raise ValueError(f"generation: must be {self.stopped} to {MAX_GENERATION}, not {generation}")
        self._words[_CULPRITS] = sum({1 << r for r in ranks})
        self.fence()
        self._words[_STOPPED] = generation
        for rank in range(self.shape.n_ranks):
            for which in range(_N_FLAGS):
                self._wake(self.shape.flag(rank, which))

    def check(self, generation: int) -> None:
        """Raises PeerLost if this generation was stopped. To be called after reading what peers wrote: peers write
        over it only after the stop, so what was read before a check that passes is whole."""
        self.fence()
        if self._words[_STOPPED] < generation:
            return
        culprits = self._words[_CULPRITS]
        ranks = [r for r in range(self.shape.n_ranks) if culprits >> r & 1]
        raise PeerLost(ranks, f"lost; generation {generation} of the group was stopped")

    def fence(self) -> None:
        """Orders memory accesses before it against those after it.

        Flags are aligned 8-byte words, which CPython stores and loads with one instruction. x86 keeps stores in order
        and loads in order, so data before a flag need nothing more. Elsewhere a futex-wake is asked of the kernel on a
        word where nobody sleeps: futex_wake runs a full barrier (smp_mb) before it looks for sleepers.
        """
        if not _STORES_IN_ORDER:
            self._wake(8 * _FENCE)

    def post(self, rank: int, which: int, generation: int, sequence: int) -> None:
        """Announce own data: everything written before is seen by whoever sees the flag."""
        at = self.shape.flag(rank, which)
        self.fence()
        self._words[at >> 3] = generation << _SEQUENCE_BITS | sequence
        self._wake(at)

    def wait(self, ranks: Iterable[int], which: int, generation: int, sequence: int, seconds: float) -> None:
        """Until each of `ranks` has posted that sequence or a later one of this generation.

        Raises PeerLost, which names all of `ranks` that have not arrived in `seconds`, or the culprits of a stop.
        """
        until = 0.0
        ranks = tuple(ranks)
        for rank in ranks:
            at = self.shape.flag(rank, which)
            spins = 0
            while not self._has(at, generation, sequence):
                spins += 1
                if spins <= _SPINS:
                    os.sched_yield()
                    continue
                self.check(generation)
                now = time.monotonic()
                until = until or now + seconds
                if now >= until:
                    late = [r for r in ranks if not self._has(self.shape.flag(r, which), generation, sequence)]
                    if late:
                        raise PeerLost(late, f"did not arrive within {seconds:g} s")
                    break
                seen = self._words[at >> 3]
                if not self._has(at, generation, sequence):
                    _syscall(_SYS_FUTEX, self._base + at, _WAIT, seen & 0xFFFFFFFF, ctypes.byref(_NAP), None, 0)
        self.check(generation)

    def _has(self, at: int, generation: int, sequence: int) -> bool:
        want = generation << _SEQUENCE_BITS | sequence
        return want <= self._words[at >> 3] < generation + 1 << _SEQUENCE_BITS

    def _wake(self, at: int) -> None:
        _syscall(_SYS_FUTEX, self._base + at, _WAKE, _ALL, None, None, 0)

    def write_ints(self, rank: int, parity: int, ints: Sequence[int]) -> None:
        at = self.shape.shared(rank, parity) >> 3
        self._ints[at] = len(ints)
        for i, value in enumerate(ints, at + _LINE // 8):
            self._ints[i] = value

    def read_ints(self, rank: int, parity: int) -> tuple[int, ...]:
        at = self.shape.shared(rank, parity) >> 3
        start = at + _LINE // 8
        return tuple(self._ints[start : start + self._ints[at]])
