"""KV rows on one host: the cache of a rank that offers lies in a file without a name, which others of the host map.

The only copy is the one into the own cache. The file is never made smaller, so a mapped row stays readable whatever
becomes of the rank; whether it still is the right one, its checksum says.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from brigade.comm.kv.link import Failed
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, Rows, copy


def create() -> int:
    """Memory for the cache of one rank, for its supervisor: an empty file whose number its processes inherit. Raises
    OSError."""
    return os.memfd_create("brigade-kv", os.MFD_CLOEXEC)


class SharedCaches:
    """The caches of this host's ranks, by number; opens offers that lie in them."""

    def __init__(self, files: Sequence[int]) -> None:
        """`files`: of all ranks; -1 for those of other hosts."""
        self._files = list(files)
        self._mapped: dict[int, Bytes] = {}

    def has(self, file: int) -> bool:
        """Whether a cache lies in memory of this host."""
        return 0 <= file < len(self._files) and self._files[file] >= 0

    def open(self, offer: Offer, until: float) -> AbstractContextManager["_Mapped"]:
        """The source of an offer. Raises Failed."""
        del until  # memory does not keep anybody waiting
        if not self.has(offer.file):
            raise Failed(f"shared memory {offer.file} is not known here; there are {len(self._files)}")
        memory = self._map(offer.file)
        size = len(offer.checks) * offer.n_pages * offer.page * offer.row_bytes
        if not 0 < size <= memory.size:
            raise Failed(f"shared memory {offer.file} has {memory.size} bytes, the offered cache {size}")
        rows = Rows(memory[:size], len(offer.checks), offer.page, offer.row_bytes)
        return nullcontext(_Mapped(rows, offer))

    def _map(self, file: int) -> Bytes:
        fd = self._files[file]
        size = os.fstat(fd).st_size
        known = self._mapped.get(file)
        if known is None or known.size != size:
            if not size:
                raise Failed(f"shared memory {file} is empty")
            known = self._mapped[file] = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), np.uint8)
        return known


class _Mapped:
    def __init__(self, rows: Rows, offer: Offer) -> None:
        self._rows, self._offer = rows, offer

    def read(self, layer: int, runs: Iterator[Bytes], until: float) -> Iterator[Bytes]:
        del until
        o = self._offer
        return copy(self._rows.runs(layer, o.pages, o.start, o.end), runs)
