"""KV rows on one host: the cache of a rank that offers lies in a file without a name, which others of the host map.

What is finished is told over a connection on the loopback; the rows themselves are copied once, from the mapped memory
into the own cache. The file is never made smaller, so a mapped row stays readable whatever becomes of the rank; whether
it still is the right one, its checksum says.
"""

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator, Sequence

import numpy as np

from brigade.comm.kv.link import Failed, GoOn
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, CacheShape, Fast, Piece, Rows, copy_checked
from brigade.comm.kv.tcp import Caller, Connected


def create() -> int:
    """Memory for the cache of one rank, for its supervisor: an empty file whose number its processes inherit. Raises
    OSError."""
    return os.memfd_create("brigade-kv", os.MFD_CLOEXEC)


class SharedCaches:
    """The caches of this host's ranks, by number; opens offers that lie in them."""

    def __init__(self, files: Sequence[int], caller: Caller, fast: Fast | None = None) -> None:
        """`files`: of all ranks; -1 for those of other hosts. `fast`: copies rows, where it can."""
        self._files, self._caller, self._fast = list(files), caller, fast
        self._mapped: dict[int, Bytes] = {}

    def has(self, file: int) -> bool:
        """Whether a cache lies in memory of this host."""
        return 0 <= file < len(self._files) and self._files[file] >= 0

    @contextlib.contextmanager
    def open(self, offer: Offer, have: Sequence[int]) -> Iterator["_Mapped"]:
        """The source of an offer. Raises Failed, OSError."""
        if not self.has(offer.file):
            raise Failed(f"shared memory {offer.file} is not known here; there are {len(self._files)}")
        memory = self.map(offer.file)
        size = CacheShape(offer.n_layers, offer.n_pages, offer.page, offer.row_bytes).size
        if not 0 < size <= memory.size:
            raise Failed(f"shared memory {offer.file} has {memory.size} bytes, the offered cache {size}")
        rows = Rows(memory[:size], offer.n_layers, offer.page, offer.row_bytes)
        with self._caller.connect(offer, have, with_rows=False) as sock:
            yield _Mapped(sock, offer, self._caller.silence, rows, self._fast)

    def map(self, file: int) -> Bytes:
        """All of a cache, to read. Raises Failed if there is none yet."""
        fd = self._files[file]
        size = os.fstat(fd).st_size
        known = self._mapped.get(file)
        if known is None or known.size != size:
            if not size:
                raise Failed(f"shared memory {file} is empty")
            known = self._mapped[file] = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), np.uint8)
        return known


class _Mapped(Connected):
    with_rows = False

    def __init__(self, sock: socket.socket, offer: Offer, silence: float, rows: Rows, fast: Fast | None) -> None:
        super().__init__(sock, offer, silence)
        self._rows, self._fast = rows, fast

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        del go_on  # memory does not keep anybody waiting
        return copy_checked(piece.runs(self._rows), runs, self._fast)
