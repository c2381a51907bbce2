"""The way of a prompt's cache rows between two ranks: offered by one, fetched by the other. Decides nothing.

1. The rank that has computed a prompt calls `Offers.offer`; checksums are made in the background, and `poll` gives the
   Offer, which is told to the other rank as a message.
2. That rank calls `Fetches.fetch` with pages of its own. Rows are copied in the background, layer by layer, and each
   layer is checked; a bad one is fetched once more.
3. `Fetches.poll` says that all rows are there, or why they are not: also when the other side says nothing at all, at a
   deadline that is this side's own. Until then the pages are being written, also after `stop`.
4. The first rank keeps the pages until it is told, or until its lease ends. Whoever reads them after that finds that
   the checksums differ.

What differs between links is how the rows of a layer get here: a `Source`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import xxhash

from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, Rows

TRIES = 2
"""How often a layer is fetched before the transfer fails."""
_AT_ONCE = 4
"""Transfers of one rank that run at the same time: one that stalls does not hold up the others."""


class Failed(ConnectionError):
    """The rows cannot be had from there."""


class Source(Protocol):
    """Where the rows of one offer come from."""

    def read(self, layer: int, runs: Iterator[Bytes], until: float) -> Iterator[Bytes]:
        """Fill `runs` with the rows of a layer; gives each run when it is full. Raises Failed, OSError."""
        ...


Open = Callable[[Offer, float], AbstractContextManager[Source]]
"""Opens the source of an offer, before a time. Raises Failed, OSError."""


class Fetched(NamedTuple):
    """How a transfer ended."""

    rid: int
    """The number of the request on the rank that fetched."""
    failure: str
    """Why the rows are not there; empty: they are, and every checksum is right."""
    seconds: float


class Offers:
    """The side that has rows to give."""

    def __init__(self, rows: Rows, file: int = -1, address: str = "") -> None:
        self.rows, self.file, self.address = rows, file, address
        self._open: dict[int, Offer] = {}
        self._making: dict[int, Future[Offer]] = {}
        self._behind = ThreadPoolExecutor(1, "kv-offers")

    @property
    def pending(self) -> bool:
        """Whether `poll` will have something soon."""
        return bool(self._making)

    def offer(self, rid: int, pages: Sequence[int], start: int, end: int) -> None:
        """The rows of tokens start..end are complete and stay where they are until `withdraw`."""
        self._making[rid] = self._behind.submit(self._make, rid, list(pages), start, end)

    def poll(self) -> list[Offer]:
        """Offers that can be told now."""
        ready = [rid for rid, making in self._making.items() if making.done()]
        out = []
        for rid in ready:
            offer = self._making.pop(rid).result()
            self._open[rid] = offer
            out.append(offer)
        return out

    def get(self, rid: int) -> Offer | None:
        """For a server's threads: an offer that still stands."""
        return self._open.get(rid)

    def withdraw(self, rid: int) -> None:
        """Nobody may read these rows any more. Harmless for what was never offered."""
        self._open.pop(rid, None)
        if making := self._making.pop(rid, None):
            making.cancel()

    def close(self) -> None:
        self._behind.shutdown(cancel_futures=True)

    def _make(self, rid: int, pages: list[int], start: int, end: int) -> Offer:
        checks = [self.rows.check(layer, pages, start, end) for layer in range(self.rows.n_layers)]
        r = self.rows
        return Offer(rid, pages, r.page, r.n_pages, start, end, r.row_bytes, checks, self.file, self.address)


class _Transfer(NamedTuple):
    done: Future[None]
    stopped: threading.Event
    began: float


class Fetches:
    """The side that wants rows."""

    def __init__(self, rows: Rows, open_source: Open, deadline: float) -> None:
        """`deadline`: seconds after which a transfer has failed, whatever the other side does."""
        self.rows, self._open, self._deadline = rows, open_source, deadline
        self._running: dict[int, _Transfer] = {}
        self._behind = ThreadPoolExecutor(_AT_ONCE, "kv-fetches")

    @property
    def pending(self) -> bool:
        return bool(self._running)

    def fetch(self, rid: int, offer: Offer, pages: Sequence[int], start: int) -> None:
        """Copy the offered rows from token `start` on, where they must begin, into `pages` of the own cache.

        Raises ValueError if `rid` is being fetched already: pages are written by one transfer at a time.
        """
        if rid in self._running:
            raise ValueError(f"request {rid} is being fetched already")
        stopped, began = threading.Event(), time.monotonic()
        done = self._behind.submit(self._fetch, offer, list(pages), start, began + self._deadline, stopped)
        self._running[rid] = _Transfer(done, stopped, began)

    def fetching(self, rid: int) -> bool:
        """Whether pages of this request are being written: then they must stay its own."""
        return rid in self._running

    def stop(self, rid: int) -> None:
        """End a transfer after the run that it waits for, at the latest at its deadline; `poll` says when nothing is
        written any more."""
        if transfer := self._running.get(rid):
            transfer.stopped.set()

    def poll(self) -> list[Fetched]:
        """Transfers that have ended, each once."""
        ended = [rid for rid, transfer in self._running.items() if transfer.done.done()]
        return [self._end(rid) for rid in ended]

    def close(self) -> None:
        """Waits for transfers, which end at the latest at their deadline."""
        for transfer in self._running.values():
            transfer.stopped.set()
        self._behind.shutdown(cancel_futures=True)

    def _end(self, rid: int) -> Fetched:
        done, _, began = self._running.pop(rid)
        error = done.exception()
        if error is not None and not isinstance(error, (OSError, ValueError)):
            raise error
        return Fetched(rid, "" if error is None else str(error) or type(error).__name__, time.monotonic() - began)

    def _fetch(self, offer: Offer, pages: list[int], start: int, until: float, stopped: threading.Event) -> None:
        r = self.rows
        if (offer.start, offer.row_bytes, len(offer.checks)) != (start, r.row_bytes, r.n_layers):
            raise Failed(
                f"rows of {offer.row_bytes} bytes in {len(offer.checks)} layers from token {offer.start} on are "
                f"offered; wanted are {r.row_bytes} bytes, {r.n_layers} layers, from {start} on"
            )
        bad = list(range(r.n_layers))
        for _ in range(TRIES):  # each time with a new source: what made one wrong must not stay
            with self._open(offer, until) as source:
                bad = [x for x in bad if not self._layer(source, offer, pages, x, until, stopped)]
            if not bad:
                return
        raise Failed(f"the checksums of layers {bad} are wrong, also after {TRIES} tries")

    def _layer(
        self, source: Source, offer: Offer, pages: list[int], layer: int, until: float, stopped: threading.Event
    ) -> bool:
        """Fetch one layer; whether its checksum is right."""
        hashed = xxhash.xxh3_64()
        for run in source.read(layer, self.rows.runs(layer, pages, offer.start, offer.end), until):
            hashed.update(run.data)
            if stopped.is_set():
                raise Failed("it was stopped")
            if time.monotonic() > until:
                raise TimeoutError(f"it took longer than {self._deadline:g} s")
        return hashed.intdigest() == offer.checks[layer]
