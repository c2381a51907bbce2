"""The side that has rows to give: which rows of which prompts are finished. Decides nothing; safe from any thread.

A prompt's rows are finished layer by layer and chunk by chunk, and whoever follows the offer is told of each at once:

1. `offer` when the rank begins to compute a prompt. Nothing is finished yet.
2. `wrote` after each layer of each chunk, from the thread that computes; `complete` when the first token is sampled.
3. `retract` when the request loses its pages on the way (it was preempted, or a step was taken back): from then on
   nothing is finished, until `wrote` says so again. What was taken before stays right: a token's row is the same
   however often it is computed. A step that was planned before speaks for an older attempt, and is not heard.
4. `withdraw` when nobody needs the rows any more, before their pages go back.

A checksum is made while the other side copies already. It is told only if, after it was made, the pages still were the
request's own. So it is always one of good rows, and whoever copies rows after their pages were used again finds that it
differs.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from brigade.comm.kv.offer import Offer, Registered
from brigade.comm.kv.rows import Piece, Rows, checksum

PIECE = 8 << 20
"""Most bytes of a piece."""


class Withdrawn(LookupError):
    """These rows are not offered, or not any more."""


@dataclass
class _Given:
    offer: Offer
    ready: list[int]
    """By layer: the rows of tokens before this one are finished."""
    changed: threading.Condition
    pages: Sequence[int] = ()
    attempt: int = 0


class Offers:
    """What one rank gives out of its cache."""

    def __init__(self, rows: Rows, file: int = -1, address: str = "", registered: Registered | None = None) -> None:
        """`file`, `address`, `registered`: what offers say of where the rows can be had."""
        self.rows, self.file, self.address, self.registered = rows, file, address, registered
        self._given: dict[int, _Given] = {}
        self._lock = threading.Lock()

    def offer(self, rid: int, start: int, end: int) -> Offer:
        """Rows of tokens start..end of this request will be given, from now until `withdraw`."""
        r = self.rows
        shape = (r.page, r.n_pages, r.n_layers, r.row_bytes)
        offer = Offer(rid, start, end, *shape, self.address, self.file, self.registered)
        with self._lock:
            self._given[rid] = _Given(offer, [start] * r.n_layers, threading.Condition(self._lock))
        return offer

    def attempt(self, rid: int) -> int:
        """For which attempt a step that is planned now may speak. Raises Withdrawn."""
        with self._lock:
            return self._of(rid).attempt

    def end(self, rid: int) -> int:
        """Up to which token rows are offered. Raises Withdrawn."""
        with self._lock:
            return self._of(rid).offer.end

    def wrote(self, rid: int, attempt: int, layer: int, end: int, pages: Sequence[int]) -> None:
        """All rows of this layer before token `end` are finished and lie in `pages`, if the attempt still stands."""
        with self._lock:
            given = self._given.get(rid)
            if given is None or given.attempt != attempt:
                return
            if len(pages) > len(given.pages):
                given.pages = pages
            given.ready[layer] = max(given.ready[layer], min(end, given.offer.end))
            given.changed.notify_all()

    def complete(self, rid: int, pages: Sequence[int]) -> None:
        """All rows of all layers are finished, whoever wrote them. Raises Withdrawn."""
        with self._lock:
            given = self._of(rid)
            given.pages, given.ready = pages, [given.offer.end] * len(given.ready)
            given.changed.notify_all()

    def retract(self, rid: int) -> None:
        """The request has lost its pages and begins again. Harmless for what is not offered."""
        with self._lock:
            if given := self._given.get(rid):
                given.attempt, given.pages, given.ready = given.attempt + 1, (), [given.offer.start] * len(given.ready)

    def withdraw(self, rid: int) -> None:
        """Nobody may read these rows any more. Harmless for what is not offered."""
        with self._lock:
            if given := self._given.pop(rid, None):
                given.changed.notify_all()

    def next(self, rid: int, have: Sequence[int], seconds: float) -> tuple[Piece, Callable[[], int | None]] | None:
        """A finished piece, for one who has each layer's rows before `have`, and what makes its checksum, which is None
        if the pages were not the request's own any more: then the piece is worth nothing. None if there is no piece
        for so long. Raises Withdrawn."""
        with self._lock:
            given = self._of(rid)
            layer = _behind(given.ready, have)
            if layer is None:
                given.changed.wait(seconds)
                given = self._of(rid)
                layer = _behind(given.ready, have)
            if layer is None:
                return None
            page, start = self.rows.page, have[layer]
            end = min(given.ready[layer], start + max(PIECE // self.rows.row_bytes, 1))
            piece = Piece(layer, start, end, tuple(given.pages[start // page : -(-end // page)]))
            return piece, partial(self._check, given, given.attempt, piece)

    def _check(self, given: _Given, attempt: int, piece: Piece) -> int | None:
        check = checksum(piece.runs(self.rows))
        with self._lock:
            still = self._given.get(given.offer.rid) is given and given.attempt == attempt
        return check if still else None

    def _of(self, rid: int) -> _Given:
        if (given := self._given.get(rid)) is None:
            raise Withdrawn(f"rows of request {rid} are not offered")
        return given


def _behind(ready: Sequence[int], have: Sequence[int]) -> int | None:
    """A layer of which more is ready."""
    return next((layer for layer, (a, b) in enumerate(zip(ready, have, strict=True)) if a > b), None)
