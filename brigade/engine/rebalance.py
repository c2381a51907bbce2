"""The supervising side of experts that move: hears loads, decides what moves, has the ranks move it. No weights.

Life of a re-balancing:
1. Every `rebalance` seconds all ranks are asked what they have counted.
2. A better placement is computed in a thread; layers that would gain too little stay as they are.
3. What changes goes out in portions of a few layers, one at a time: Portion to all ranks, Staged from all, and a wake
   call in case they sleep; the ranks agree on the step, and Settled comes from all.
4. A portion that a rank could not read is dropped by all, and with it what was left of this re-balancing.

A unit that is lost in between may have made the last portion or not, and not all its ranks alike. What holds is decided
here, by `lost`: ranks that live on and those that are started anew are told the number of the portion that holds.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from brigade.core.moves import Move, after, moves, portions, settle, where_it_pays
from brigade.core.placement import Loads as PlacedLoads
from brigade.core.placement import Placement
from brigade.engine.config import EngineConfig
from brigade.engine.loads import ExpertLoads, Ledger, Moved, ratio
from brigade.engine.messages import Loads, Portion, Settled, Staged, TellLoads
from brigade.engine.output import Unavailable
from brigade.engine.placing import better_placement, first_placement
from brigade.spec.model import ModelSpec

log = logging.getLogger("brigade.engine")

Send = Callable[[int, Any], None]

ANSWER_DEADLINE = 30.0
"""Seconds until a rank must have told its loads: it does so between two steps."""
STAGE_PATIENCE = 60.0
"""Seconds of waiting for a portion after which the log says who is still reading it."""
LEAST_PER_EXPERT = 8
"""Tokens of a mean expert below which loads are chance."""
STAGED_BYTES = 1 << 30
"""Most memory that a portion should take on a rank, and MOST_LAYERS at most; one layer is the least."""
MOST_LAYERS = 4


@dataclass
class _Flight:
    """A portion on its way."""

    portion: Portion
    staged: dict[int, str] = field(default_factory=dict)
    """Rank -> its problem, or nothing."""
    settled: dict[int, bool] = field(default_factory=dict)
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    applied: bool = False


class Rebalancer:
    """The experts of one unit. Use it from one event loop."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, n_nodes: int = 1) -> None:
        """`n_nodes`: hosts of the unit, as far as placing experts goes. Raises ValueError for settings that do not fit
        the model."""
        self._config, self._spec = config, spec
        self.placement = self._first = first_placement(config, spec, n_nodes)
        self.portion = 0
        """The last portion that the placement includes."""
        self._ledger = Ledger(self._first.n_layers, self._first.n_experts, config.ranks) if self._first else None
        self._seqs, self._numbers = itertools.count(1), itertools.count(1)
        self._told: dict[int, set[int]] = {}
        self._all_told = asyncio.Event()
        self._asking = asyncio.Lock()
        self._flight: _Flight | None = None
        self._send: Send | None = None
        self._wake: Callable[[], None] = lambda: None
        self._n_moved = self._n_portions = self._n_dropped = 0
        self._last: str | None = None

    def up(self, send: Send, wake: Callable[[], None]) -> None:
        """A unit serves with this placement. `wake` lets sleeping ranks meet once."""
        self._send, self._wake = send, wake

    def where(self) -> tuple[Placement | None, int]:
        """What ranks must hold that are started, or formed anew, from now on until the unit is up."""
        self.lost()
        return self.placement, self.portion

    def lost(self) -> None:
        """The unit is not whole any more. Moves that were under way end, made or not."""
        self._send = None
        self._told.clear()
        self._all_told.set()
        if self._flight is not None:
            self._land(self._flight, any(self._flight.settled.values()))

    def take(self, rank: int, message: Staged | Settled | Loads) -> None:
        """A message of a rank; one of what was given up is nothing. Raises ValueError for loads of another model."""
        flight = self._flight
        match message:
            case Loads(seq):
                assert self._ledger is not None
                self._ledger.add(rank, message)
                if waiting := self._told.get(seq):
                    waiting.discard(rank)
                    if not waiting:
                        self._all_told.set()
            case Staged(number, problem) if flight and flight.portion.number == number:
                flight.staged[rank] = problem
                if problem:
                    log.error("rank %d cannot move experts: %s", rank, problem)
                if len(flight.staged) == self._config.ranks:
                    self._wake()
            case Settled(number, applied) if flight and flight.portion.number == number:
                flight.settled[rank] = applied
                if len(flight.settled) == self._config.ranks:
                    self._land(flight, applied)
            case _:
                log.debug("rank %d: %s of a portion that was given up", rank, type(message).__name__)

    async def run(self) -> None:
        """Look at the loads every `rebalance` seconds, for ever. Returns at once where nothing can move."""
        if self._config.rebalance == 0 or self._config.ranks == 1 or self._ledger is None:
            return
        while True:
            await asyncio.sleep(self._config.rebalance)
            try:
                await self.look()
            except Unavailable as e:
                log.info("experts were not looked at: %s", e)

    async def look(self) -> int:
        """Ask for the loads once and move what pays; how many slots have changed hands. Raises Unavailable."""
        await self._ask()
        if self._ledger is None or self.placement is None:
            return 0
        load_LE, now = self._ledger.recent_LE, self.placement
        if sum(load_LE[0]) < LEAST_PER_EXPERT * now.n_experts or not self._ledger.age():
            return 0
        target = await asyncio.to_thread(_target, self._spec, now, load_LE)
        return await self.move_to(target)

    async def move_to(self, target: Placement) -> int:
        """Have the ranks come to this placement, portion by portion; how many slots have changed hands."""
        if self.placement is None:
            raise ValueError("a model without routed experts has nothing to move")
        n = 0
        for portion in list(portions(moves(self.placement, target), self._layers_at_once())):
            if not await self._fly(portion):
                break
            n += len(portion)
        if n:
            log.info("%d expert slots changed hands", n)
        return n

    async def report(self) -> ExpertLoads | None:
        """Loads and places as they are now; None for a model without routed experts. Raises Unavailable."""
        if self._ledger is None or self.placement is None or self._first is None:
            return None
        await self._ask()
        layers = self._ledger.layers(self._spec.n_dense, self.placement, self._first)
        return ExpertLoads(
            n_ranks=self.placement.n_ranks,
            n_experts=self.placement.n_experts,
            redundant=self._config.redundant_experts,
            rebalance=self._config.rebalance if self._config.ranks > 1 else 0.0,
            rank_of_slot=list(self.placement.rank_of_slot),
            busiest_over_mean=ratio([x.rank_loads for x in layers]),
            busiest_over_mean_before=ratio([x.rank_loads_before for x in layers]),
            busiest_over_mean_received=ratio([x.received for x in layers]),
            moved=Moved(self._n_moved, self._n_portions, self._n_dropped, self._last),
            layers=layers,
        )

    async def _ask(self) -> None:
        """Have all ranks tell their loads. Raises Unavailable."""
        async with self._asking:
            if self._send is None:
                raise Unavailable("the worker is being restarted")
            seq = next(self._seqs)
            waiting = self._told[seq] = set(range(self._config.ranks))
            self._all_told.clear()
            for rank in range(self._config.ranks):
                self._send(rank, TellLoads(seq))
            try:
                await asyncio.wait_for(self._all_told.wait(), ANSWER_DEADLINE)
            except TimeoutError:
                raise Unavailable(f"rank {min(waiting)} has not told its loads for {ANSWER_DEADLINE:.0f} s") from None
            finally:
                self._told.pop(seq, None)
            if waiting:
                raise Unavailable("the worker was lost")

    async def _fly(self, portion: Sequence[Move]) -> bool:
        """Send one portion and wait until all ranks have made it, or dropped it; whether it was made."""
        if self._send is None:
            return False
        flight = self._flight = _Flight(Portion(next(self._numbers), tuple(portion)))
        for rank in range(self._config.ranks):
            self._send(rank, flight.portion)
        while True:
            try:
                await asyncio.wait_for(flight.landed.wait(), STAGE_PATIENCE)
            except TimeoutError:
                late = sorted({*range(self._config.ranks)} - {*(flight.staged or {})})
                log.warning("experts to move are still being read by ranks %s", late)
            else:
                return flight.applied

    def _land(self, flight: _Flight, applied: bool) -> None:
        """What has become of a portion is known."""
        self._flight = None
        flight.applied = applied
        flight.landed.set()
        if not applied:
            self._n_dropped += 1
            return
        assert self.placement is not None
        assert self._ledger is not None
        self.placement = after(self.placement, flight.portion.moves)
        self.portion = flight.portion.number
        self._ledger.moved()
        self._n_moved += len(flight.portion.moves)
        self._n_portions += 1
        self._last = datetime.now(UTC).isoformat(timespec="seconds")

    def _layers_at_once(self) -> int:
        assert self.placement is not None
        assert self._spec.moe is not None
        expert = 3 * 2 * self._spec.dim * self._spec.moe.ffn
        of_layer = max(map(len, self.placement.slots_of_rank)) * expert
        return max(1, min(MOST_LAYERS, STAGED_BYTES // of_layer))


def _target(spec: ModelSpec, now: Placement, load_LE: PlacedLoads) -> Placement:
    return where_it_pays(now, settle(now, better_placement(spec, now, load_LE)), load_LE)
