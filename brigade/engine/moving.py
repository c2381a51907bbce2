"""One rank's part in moving experts while it serves. Must not decide what moves, nor between which steps.

Life of a portion:
1. take: a thread of low priority reads the experts that come to this rank's slots and packs them, beside the steps,
   with pauses.
2. staged: it says so, in every step's Shape and once to the engine; below zero where something could not be read.
3. agreed: all ranks have staged it, so all swap between the same two steps, or all drop it because one could not.
4. What was swapped out stays until the next portion: hold() can take the last one back or make up for it, when the unit
   is formed anew and not all its ranks had come to the same end. Its memory is then used for the next portion.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from brigade.comm.channel import ChannelClosed
from brigade.core.moves import after
from brigade.core.placement import Placement
from brigade.engine.messages import Portion, Settled, Staged
from brigade.model.reread import ExpertFiles
from brigade.model.spread import Spread, Table
from brigade.spec.config import BadConfig

log = logging.getLogger("brigade.worker")

Tell = Callable[[Staged | Settled], None]

NICE = 10
"""Staging gets about a tenth of a core that a step also wants. Not less: a step must never wait long for a thread that
holds Python's lock and is not let on a core."""
SHARE = 0.25
"""Part of the time that staging may compute. Steps leave cores idle while ranks wait for each other, but reading and
packing weights takes caches and memory from them all the same."""


class Movable(Protocol):
    """A model whose experts can be exchanged."""

    def stage(self, layer: int, expert: tuple[Tensor, Tensor, Tensor], spare: Any) -> Any: ...
    def swap(self, layer: int, slot: int, place: Any) -> Any: ...


@dataclass
class _Change:
    """What a portion means here. It holds what is not in place now: made twice, it is as if it had not been made."""

    number: int
    placement: Placement
    includes: int
    """The last portion that this placement includes."""
    places: dict[tuple[int, int], Any] = field(default_factory=dict)
    """(layer, own slot) -> memory with the expert to come."""
    tables: dict[int, Table] = field(default_factory=dict)
    whole: bool = False
    """Everything was read."""


class Mover:
    """The experts of one rank, and which portion of moves they include. take and agreed are called by the loop; hold,
    and what agreed returns, run between two steps."""

    def __init__(
        self,
        model: Movable,
        spread: Spread,
        files: ExpertFiles,
        rank: int,
        placement: Placement,
        number: int,
        first: int,
    ) -> None:
        """`number`: the last portion that `placement` includes; `first`: the model layer of its layer 0."""
        self._model, self._spread, self._files = model, spread, files
        self._slots, self._first = placement.slots_of_rank[rank], first
        self.placement, self.number = placement, number
        self.staged = 0
        """The portion that waits for the ranks to agree, below zero if it could not be read; 0: none."""
        self._change: _Change | None = None
        self._spare: list[Any] = []
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def take(self, portion: Portion, tell: Tell) -> None:
        """Begin to stage a portion; `tell` is called, from any thread, when that is done and when it is settled."""
        if self._change is not None:
            self._spare += self._change.places.values()
        self.staged = 0
        self._tell = tell
        change = self._change = _Change(portion.number, after(self.placement, portion.moves), portion.number)
        self._thread = threading.Thread(
            target=self._stage, args=(change, portion, self._thread), name="staging", daemon=True
        )
        self._thread.start()

    def agreed(self, portion: int) -> Callable[[], None]:
        """What all ranks do between the same two steps about the portion they agreed on (Agreed.portion)."""
        change = self._change
        if change is None or self.staged == 0 or abs(portion) != change.number:
            raise ValueError(f"the ranks agreed about portion {abs(portion)} of moves, which this rank has not staged")
        self.staged = 0

        def settle() -> None:
            if portion > 0:
                self._swap(change)
            self._tell(Settled(change.number, portion > 0))

        return settle

    def hold(self, number: int) -> None:
        """Make this rank's experts those that the unit has after portion `number`. Forgets what is being staged.

        Raises ValueError if this rank cannot get there; it must then be replaced.
        """
        self.staged = 0
        change = self._change
        if change is not None and not change.whole:
            change = self._change = None  # a thread that still stages it finds out
        if number == self.number:
            return
        if change is None or change.includes != number:
            raise ValueError(f"this rank's experts are those after portion {self.number} of moves, not {number}")
        self._swap(change)

    def close(self, deadline: float = 3.0) -> None:
        """End the staging thread, which must not be inside torch when the process ends."""
        self._change = None
        self._closed.set()
        if self._thread is not None:
            self._thread.join(deadline)

    def _swap(self, change: _Change) -> None:
        for (layer, slot), place in change.places.items():
            change.places[layer, slot] = self._model.swap(self._first + layer, slot, place)
        for layer, table in change.tables.items():
            change.tables[layer], self._spread.tables[layer] = self._spread.tables[layer], table
        self.placement, change.placement = change.placement, self.placement
        self.number, change.includes = change.includes, self.number

    def _stage(self, change: _Change, portion: Portion, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # one that was given up: it ends at its next expert
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        problem = ""
        try:
            self._read(change, portion)
        except (BadConfig, OSError, MemoryError, ValueError, RuntimeError) as e:  # RuntimeError: torch has no memory
            problem = str(e) or type(e).__name__
            log.error("experts cannot be moved: %s", problem)
        if self._change is not change:
            return
        change.whole = not problem
        self.staged = -change.number if problem else change.number
        with suppress(ChannelClosed):  # the loop finds that out, too
            self._tell(Staged(change.number, problem))

    def _read(self, change: _Change, portion: Portion) -> None:
        for layer, slot, expert in portion.moves:
            if self._change is not change:
                return
            if layer not in change.tables:
                change.tables[layer] = self._spread.table(change.placement, layer)
            if slot not in self._slots:
                continue
            begin = time.thread_time()
            weights = self._files.read(self._first + layer, expert)
            spare = self._spare.pop() if self._spare else None
            change.places[layer, slot - self._slots.start] = self._model.stage(self._first + layer, weights, spare)
            self._closed.wait((time.thread_time() - begin) * (1 / SHARE - 1))
