"""The way of a prompt's cache rows, while it is computed, to the rank that goes on with it. Decides nothing.

1. The rank that computes a prompt calls `Offers.offer` when it begins. The Offer is told to the other rank.
2. That rank calls `Fetches.fetch` with pages of its own. It hears of every piece of a layer that is finished, copies it
   in the background, and checks it; the other side makes its checksum meanwhile. A bad piece is fetched again.
3. Whatever goes wrong before the prompt is computed costs nothing yet: it is tried again from where it stopped, also
   from another rank (`move`) when the first one is lost.
4. `hurry` when the first token is there, which means that all rows are finished: from then on there is a deadline, and
   two more tries.
5. `Fetches.poll` says that all rows are there, or why they are not. Until then the pages are being written, also after
   `stop`.
6. The first rank keeps the pages until it is told, or until its lease ends. Whoever reads them after that finds that
   the checksums differ.

What differs between links is how the rows of a piece get here: a `Source`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, Piece, Rows

log = logging.getLogger("brigade.kv")

TRIES = 2
"""How often a transfer may go wrong, once all rows are finished, before it fails."""
_PAUSE = 0.25
"""Seconds before it is tried again, while the rows are not finished."""
_LOOK = 0.05
"""Seconds between two looks, while steps have the pages, at whether the transfer goes on at all."""
_AT_ONCE = 64
"""Transfers of one rank that run at the same time: most of them wait for the other side to compute."""


class Failed(ConnectionError):
    """The rows cannot be had from there."""


class Moved(Exception):
    """Another rank has the rows now."""


GoOn = Callable[[], None]
"""Raises what ends the wait for the other side: Moved, Failed, TimeoutError. Called at least ten times a second."""


class Source(Protocol):
    """Where the rows of one offer come from."""

    def next(self, go_on: GoOn) -> Piece:
        """Wait for a finished piece. Raises Failed, OSError, and what `go_on` does."""
        ...

    def read(self, piece: Piece, runs: Iterator[Bytes], go_on: GoOn) -> int:
        """Fill `runs` with the rows of the piece that came last. The checksum of what was written. Raises as `next`."""
        ...

    def check(self, go_on: GoOn) -> int | None:
        """The checksum of the piece that was read; None: its pages were used for something else meanwhile, and it comes
        again. Raises as `next`."""
        ...


Open = Callable[[Offer, Sequence[int]], AbstractContextManager[Source]]
"""Opens the source of an offer, for one who has each layer's rows before these tokens. Raises Failed, OSError."""


class Fetched(NamedTuple):
    """How a transfer ended."""

    rid: int
    """The number of the request on the rank that fetched."""
    failure: str
    """Why the rows are not there; empty: they are, and every checksum is right."""


class _Transfer:
    """What one thread copies, and how it is told what others want of it."""

    def __init__(self, offer: Offer, pages: Sequence[int], start: int, after: "Future[Any] | None") -> None:
        self.offer, self.pages, self._after = offer, list(pages), after
        self.have = [start] * offer.n_layers
        self.until: float | None = None
        """When it has failed; None: the rows are not finished yet."""
        self.done: Future[None]
        self._wake, self._moved, self._stopped = threading.Event(), False, False

    @property
    def complete(self) -> bool:
        return all(have >= self.offer.end for have in self.have)

    @property
    def over(self) -> bool:
        return self._stopped or (self.until is not None and time.monotonic() > self.until)

    def move(self, offer: Offer) -> None:
        self.offer, self._moved = offer, True
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def hurry(self, until: float) -> None:
        self.until = until
        self._wake.set()

    def begin(self) -> Offer:
        """The offer that holds now."""
        self._moved = False
        self._wake.clear()
        return self.offer

    def go_on(self) -> None:
        if self._stopped:
            raise Failed("it was stopped")
        if self._moved:
            raise Moved
        if self.over:
            raise TimeoutError("the rows did not come in time")

    def settle(self) -> None:
        """Wait for the steps that may still write into the pages. Raises what `go_on` does."""
        while self._after is not None and not self._after.done():
            self.go_on()
            wait([self._after], _LOOK)

    def pause(self) -> None:
        """Before another try: none once the rows are finished, or when something has changed."""
        if self.until is None:
            self._wake.wait(_PAUSE)


class Fetches:
    """The side that wants rows."""

    def __init__(self, rows: Rows, open_source: Open, deadline: float) -> None:
        """`deadline`: seconds after `hurry` when a transfer has failed, whatever the other side does."""
        self.rows, self._open, self._deadline = rows, open_source, deadline
        self._running: dict[int, _Transfer] = {}
        self._behind = ThreadPoolExecutor(_AT_ONCE, "kv-fetches")

    def fetch(
        self, rid: int, offer: Offer, pages: Sequence[int], start: int, after: "Future[Any] | None" = None
    ) -> None:
        """Copy the offered rows from token `start` on, where they must begin, into `pages` of the own cache; not before
        `after` is done, whatever comes of it.

        Raises ValueError if `rid` is being fetched already: pages are written by one transfer at a time.
        """
        if rid in self._running:
            raise ValueError(f"request {rid} is being fetched already")
        transfer = self._running[rid] = _Transfer(offer, pages, start, after)
        transfer.done = self._behind.submit(self._run, transfer, start)

    def fetching(self, rid: int) -> bool:
        """Whether pages of this request are being written: then they must stay its own."""
        return rid in self._running

    def move(self, rid: int, offer: Offer) -> None:
        """Go on from another rank, which computes the prompt anew. Harmless for what is not being fetched."""
        if (transfer := self._running.get(rid)) and transfer.offer != offer:
            transfer.move(offer)

    def hurry(self, rid: int) -> None:
        """All rows are finished: the deadline begins. Harmless for what is not being fetched."""
        if transfer := self._running.get(rid):
            transfer.hurry(time.monotonic() + self._deadline)

    def stop(self, rid: int) -> None:
        """End a transfer soon; `poll` says when nothing is written any more."""
        if transfer := self._running.get(rid):
            transfer.stop()

    def poll(self) -> list[Fetched]:
        """Transfers that have ended, each once."""
        return [self._end(rid) for rid in [rid for rid, transfer in self._running.items() if transfer.done.done()]]

    def close(self) -> None:
        """Ends all transfers, and waits until nothing is written any more."""
        for transfer in self._running.values():
            transfer.stop()
        self._behind.shutdown(cancel_futures=True)

    def _end(self, rid: int) -> Fetched:
        error = self._running.pop(rid).done.exception()
        if error is not None and not isinstance(error, (OSError, ValueError)):
            raise error
        return Fetched(rid, "" if error is None else str(error) or type(error).__name__)

    def _run(self, transfer: _Transfer, start: int) -> None:
        n_bad = 0
        while True:
            offer = transfer.begin()
            self._check(offer, start, len(transfer.have))
            try:
                transfer.settle()
                self._follow(offer, transfer)
                return
            except Moved:
                continue
            except (OSError, ValueError) as e:
                n_bad += transfer.until is not None
                if n_bad >= TRIES or transfer.over:
                    raise
                log.info("rows of request %d of %s: %s; trying again", offer.rid, offer.address, e)
            transfer.pause()

    def _check(self, offer: Offer, start: int, n_layers: int) -> None:
        r = self.rows
        if (offer.start, offer.row_bytes, offer.n_layers) != (start, r.row_bytes, r.n_layers) or n_layers != r.n_layers:
            raise Failed(
                f"rows of {offer.row_bytes} bytes in {offer.n_layers} layers from token {offer.start} on are "
                f"offered; wanted are {r.row_bytes} bytes, {r.n_layers} layers, from {start} on"
            )

    def _follow(self, offer: Offer, transfer: _Transfer) -> None:
        """Copy pieces as they are finished, until all rows are there."""
        have = transfer.have
        with self._open(offer, have) as source:
            while not transfer.complete:
                piece = source.next(transfer.go_on)
                layer, start, end, _ = piece
                if not (layer < len(have) and start == have[layer] < end <= offer.end):
                    raise Failed(f"tokens {start} to {end} of layer {layer} come out of turn")
                found = source.read(piece, self.rows.runs(layer, transfer.pages, start, end), transfer.go_on)
                check = source.check(transfer.go_on)
                if check is None:
                    continue
                if found != check:
                    raise Failed(f"the checksum of tokens {start} to {end} of layer {layer} is wrong")
                have[layer] = end
