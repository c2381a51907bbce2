"""A rank's KV cache as bytes: rows of tokens, layer by layer, whatever the size of its pages. Knows no tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
BLOCK = 256 << 10
"""Bytes that are copied at once. Whoever checks a block right after it was copied finds it in the core's own cache, and
larger ones would not fit there; smaller ones need more steps of Python."""
FAST_RUN = 128 << 10
"""Bytes of a run, on average, from which on it pays to ask for another way to copy: to tell it of a run takes 3 us."""


class CacheShape(NamedTuple):
    """A cache is [layers, pages, page, row_bytes]; a token has one row in each layer."""

    n_layers: int
    n_pages: int
    page: int
    row_bytes: int

    @property
    def size(self) -> int:
        return self.n_layers * self.n_pages * self.page * self.row_bytes

    def spans(self, layer: int, pages: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the rows of tokens start..end of a request with this page table lie, in order: (first byte, number of
        bytes).

        Raises ValueError for pages that this cache does not have: page numbers may come from another rank.
        """
        page = self.page
        if not 0 <= start <= end <= len(pages) * page or not 0 <= layer < self.n_layers:
            raise ValueError(f"tokens {start} to {end} of layer {layer} are not in {len(pages)} pages of {page}")
        base = layer * self.n_pages * page
        for row, n in _stretches(tuple(pages[start // page : -(-end // page)]), self.n_pages, page, start, end):
            yield (base + row) * self.row_bytes, n * self.row_bytes


@lru_cache(maxsize=64)
def _stretches(pages: tuple[int, ...], n_pages: int, page: int, start: int, end: int) -> list[tuple[int, int]]:
    """Rows that follow each other in every layer: (first row, number of rows), at most as many as there are pages. The
    table is that of tokens start..end alone. Remembered, because all layers of a chunk are asked for in turn.
    Raises ValueError for pages that do not exist."""
    table = np.array(pages, np.int64)
    if (bad := table[(table < 0) | (table >= n_pages)]).size:
        raise ValueError(f"page {bad[0]} does not exist; there are {n_pages}")
    out, at = list[tuple[int, int]](), start
    gaps = (np.flatnonzero(np.diff(table) != 1) + 1).tolist()
    for first, last in zip([0, *gaps], [*gaps, len(pages)], strict=True):
        stop = min(end, (start // page + last) * page)
        if at < stop:
            out.append((pages[first] * page + at % page, stop - at))
        at = stop
    return out


@dataclass(frozen=True)
class Rows:
    """A cache in this process's memory."""

    memory: Bytes
    n_layers: int
    page: int
    row_bytes: int

    def __post_init__(self) -> None:
        if self.memory.ndim != 1 or self.memory.size != self.shape.size:
            raise ValueError(f"{self.memory.size} bytes are not whole pages of {self.n_layers} layers")

    @property
    def n_pages(self) -> int:
        return self.memory.size // (self.n_layers * self.page * self.row_bytes)

    @property
    def shape(self) -> CacheShape:
        return CacheShape(self.n_layers, self.n_pages, self.page, self.row_bytes)

    def runs(self, layer: int, pages: Sequence[int], start: int, end: int) -> Iterator[Bytes]:
        """The rows of tokens start..end of a request with this page table, in order, as views of at most RUN bytes.
        Raises ValueError as `CacheShape.spans` does."""
        for at, n in self.shape.spans(layer, pages, start, end):
            yield self.memory[at : at + n]


class Piece(NamedTuple):
    """Finished rows: tokens start..end of one layer."""

    layer: int
    start: int
    end: int
    pages: tuple[int, ...]
    """Page table from the page of token `start` on; empty where the reader need not know it."""

    def runs(self, rows: Rows) -> Iterator[Bytes]:
        """The rows of this piece in the cache that its page table is about. Raises ValueError as `CacheShape.spans`."""
        first = self.start // rows.page * rows.page
        return rows.runs(self.layer, self.pages, self.start - first, self.end - first)

    def spans(self, shape: CacheShape) -> Iterator[tuple[int, int]]:
        """Where they lie in a cache of this shape. Raises ValueError as `CacheShape.spans` does."""
        first = self.start // shape.page * shape.page
        return shape.spans(self.layer, self.pages, self.start - first, self.end - first)


def checksum(runs: Iterable[Bytes]) -> int:
    """XXH3, 64 bits, over these bytes. The size of pages does not matter.

    It finds what went wrong on the way and pages that were used again; it is no proof against an attacker.
    """
    hashed = xxhash.xxh3_64()
    for run in runs:
        hashed.update(run.data)
    return hashed.intdigest()


Fast = Callable[[Sequence[tuple[Bytes, Bytes]]], int | None]
"""Copies the first of each two runs of the same size into the second, and gives the checksum of what was written; None:
it does not serve runs of these sizes, and nothing was done."""


def copy(source: Iterable[Bytes], target: Iterable[Bytes]) -> None:
    """Fill the runs of `target` from those of `source`, the same bytes in other pieces."""
    for there, here in _together(source, target):
        here[:] = there


def copy_checked(source: Iterable[Bytes], target: Iterable[Bytes], fast: Fast | None = None) -> int:
    """Fill the runs of `target` from those of `source`, the same bytes in other pieces. The checksum of what was
    written."""
    runs = list(_together(source, target))
    long = sum(here.size for _, here in runs) >= len(runs) * FAST_RUN
    if fast is not None and long and (check := fast(runs)) is not None:
        return check
    hashed = xxhash.xxh3_64()
    for there, here in runs:
        for at in range(0, here.size, BLOCK):
            here[at : at + BLOCK] = there[at : at + BLOCK]
            hashed.update(here[at : at + BLOCK].data)
    return hashed.intdigest()


def _together(source: Iterable[Bytes], target: Iterable[Bytes]) -> Iterator[tuple[Bytes, Bytes]]:
    """Runs of both, cut so that each two have one size."""
    more, left = iter(source), np.empty(0, np.uint8)
    for run in target:
        while run.size:
            if not left.size:
                left = next(more)
            n = min(left.size, run.size)
            yield left[:n], run[:n]
            left, run = left[n:], run[n:]
