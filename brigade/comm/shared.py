"""Group and expert exchange of the ranks of one host through their segment.

A token's row is written once by its source, whatever the number of its experts; ranks gather the rows they need
straight from there, and sources fetch results straight from where they were computed. No bytes pass the kernel.

Why nothing is overwritten too early, with one region per rank and lane: a source writes rows of call q + 1 after its
finish_combine of q, which waited for the results of *every* rank, which each posts after it has read all rows of q.
A rank writes results of q + 1 after its finish_dispatch of q + 1, which waited for every source's rows of q + 1, which
each posts after it has fetched all results of q.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brigade.comm.exchange import LANES, Bounds, Turns
from brigade.comm.group import checked, checked_deadline
from brigade.comm.segment import MAX_GENERATION, MAX_PARTS, Flag, Segment
from brigade.comm.wire import Rows, Wire, raw


class SharedGroup:
    """The ranks of one host. `form` makes the next generation; it is called before the first `share`, too."""

    def __init__(self, segment: Segment, rank: int, *, deadline: float) -> None:
        if not 0 <= rank < segment.shape.n_ranks:
            raise ValueError(f"rank: the segment is for ranks below {segment.shape.n_ranks}, not {rank}")
        self.segment, self.rank, self.size = segment, rank, segment.shape.n_ranks
        self.deadline = checked_deadline(deadline)
        self.generation = 0
        self.exchanges = [0] * LANES
        self._shares = 0

    def form(self, generation: int, deadline: float | None = None) -> None:
        """Meet all ranks of a generation: 1 at first, then one more after each stop by the supervisor.

        Waits up to `deadline` seconds (the group's own if None). Raises PeerLost, which names the ranks that did not
        come; ValueError if that generation is not due.
        """
        self.segment.check(generation)
        due = self.segment.stopped + 1
        if generation != due or generation > MAX_GENERATION:
            raise ValueError(f"generation: {due} is due (the supervisor stops a generation first), not {generation}")
        self.generation, self._shares, self.exchanges = generation, 0, [0] * LANES
        for which in range(Flag.COMBINE + LANES):
            self.segment.post(self.rank, which, generation, 0)
        self._share((), self.deadline if deadline is None else checked_deadline(deadline))

    def share(self, ints: Sequence[int]) -> list[tuple[int, ...]]:
        return self._share(checked(ints), self.deadline)

    def _share(self, ints: tuple[int, ...], deadline: float) -> list[tuple[int, ...]]:
        if not self.generation:
            raise RuntimeError("share before form")
        # Two places in turn suffice: place q is written again for q + 2, after q + 1 of all ranks was read, which they
        # post after they have read q.
        self._shares += 1
        parity = self._shares & 1
        self.segment.write_ints(self.rank, parity, ints)
        self.segment.post(self.rank, Flag.SHARE, self.generation, self._shares)
        self.wait(Flag.SHARE, self._shares, deadline)
        out = [self.segment.read_ints(r, parity) for r in range(self.size)]
        self.segment.check(self.generation)
        return out

    def wait(self, which: int, sequence: int, deadline: float | None = None) -> None:
        """Until every rank has posted `sequence`. Raises PeerLost."""
        self.segment.wait(range(self.size), which, self.generation, sequence, deadline or self.deadline)

    @property
    def stopped(self) -> bool:
        """Whether the supervisor has stopped this generation."""
        return self.segment.stopped >= self.generation

    def close(self) -> None:
        self.segment.close()


class SharedExchange:
    """ExpertExchange over a segment, for one generation of its group.

    Experts may move: make another one with other bounds, on every rank at the same call, with no lane under way.
    """

    def __init__(self, group: SharedGroup, bounds: Sequence[int], wire: Wire, n_parts: int = 1) -> None:
        if not 1 <= n_parts <= MAX_PARTS:
            raise ValueError(f"n_parts: must be 1 to {MAX_PARTS}, not {n_parts}")
        self._n_parts = n_parts
        self._ends: list[Sequence[int]] = [()] * LANES
        shape = group.segment.shape
        if wire.width != shape.width or wire.row_bytes > shape.row_bytes:
            raise ValueError(f"wire: the segment's rows are {shape.width} wide, {shape.row_bytes} bytes at most")
        self._bounds = Bounds(bounds, group.size, shape.k, wire)
        self._group, self._segment, self._turns = group, group.segment, Turns()
        self._generation = group.generation
        self._max_tokens = shape.max_tokens
        # kept by the group: flags must go on counting when another exchange takes over
        self._sequence = group.exchanges
        self._flat: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * LANES
        self._starts = [[0]] * LANES
        ranks = range(group.size)
        self._views = [[_Views(group.segment, r, lane, wire) for r in ranks] for lane in range(LANES)]

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor, ends: Sequence[int] = ()) -> None:
        """`ends` cuts the tokens into parts, the same number on every rank: where each part ends. Rows then come in the
        order of part, source rank, token, k. One part if empty."""
        flat = self._bounds.check(x_TD, slots_TK)
        self.offer(lane, self._bounds.wire.encode(x_TD), flat, ends)

    def offer(self, lane: int, rows: Rows, flat: NDArray[np.int32], ends: Sequence[int] = ()) -> None:
        """start_dispatch for rows that are encoded already, and their slots [T * K]."""
        n_tokens = len(rows)
        if n_tokens > self._max_tokens:
            raise ValueError(f"x: the segment has room for {self._max_tokens} tokens of a rank, not {n_tokens}")
        self._take(lane, "start_dispatch")
        mine = self._views[lane][self._group.rank]
        ends = ends or (n_tokens,)
        if len(ends) != self._n_parts or ends[-1] != n_tokens:
            raise ValueError(f"ends: {self._n_parts} parts of {n_tokens} tokens cannot end at {list(ends)}")
        mine.ends[: self._n_parts] = ends
        mine.slots[: flat.size] = flat
        mine.rows[:n_tokens] = rows
        self._flat[lane] = mine.slots[: flat.size]
        self._ends[lane] = ends
        self._sequence[lane] += 1
        self._segment.post(self._group.rank, Flag.DISPATCH + lane, self._generation, self._sequence[lane])

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        self._take(lane, "finish_dispatch")
        self._group.wait(Flag.DISPATCH + lane, self._sequence[lane])
        bounds, rank, k = self._bounds, self._group.rank, self._bounds.k
        views = self._views[lane]
        ends = [v.ends[: self._n_parts].tolist() for v in views]
        flats = [v.slots[: e[-1] * k] for v, e in zip(views, ends, strict=True)]
        pairs = [bounds.pairs(flat, rank) for flat in flats]
        cuts = [_cut(p, e, k) for p, e in zip(pairs, ends, strict=True)]
        blocks = [(source, *cuts[source][part]) for part in range(self._n_parts) for source in range(bounds.size)]
        starts = [0, *accumulate(hi - lo for _, lo, hi in blocks)]
        self._starts[lane] = starts
        rows_ND, slot_N = bounds.rows(starts[-1])
        slot = slot_N.numpy()
        for (source, first, last), (lo, hi) in zip(blocks, pairwise(starts), strict=True):
            if lo == hi:
                continue
            block = pairs[source][first:last]
            bounds.wire.decode(views[source].rows, block // k, rows_ND[lo:hi])
            np.subtract(flats[source][block], bounds.of[rank], out=slot[lo:hi])
        self._segment.check(self._generation)
        return rows_ND, slot_N

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        starts = self._starts[lane]
        self._bounds.check_results(y_ND, starts[-1])
        self._take(lane, "start_combine")
        mine = self._views[lane][self._group.rank]
        mine.starts[: len(starts) - 1] = starts[:-1]
        mine.results[: starts[-1]].copy_(y_ND.detach())
        self._segment.post(self._group.rank, Flag.COMBINE + lane, self._generation, self._sequence[lane])

    def finish_combine(self, lane: int) -> Tensor:
        return self._bounds.given(self.results(lane))

    def results(self, lane: int) -> Tensor:
        """finish_combine for results [T * K, D] as they travel."""
        self._take(lane, "finish_combine")
        self._group.wait(Flag.COMBINE + lane, self._sequence[lane])
        bounds, flat = self._bounds, self._flat[lane]
        y_PD = bounds.results(flat)
        out = raw(y_PD)
        for rank in range(bounds.size):
            pairs = bounds.pairs(flat, rank)
            if not pairs.size:
                continue
            views = self._views[lane][rank]
            for part, (lo, hi) in enumerate(_cut(pairs, self._ends[lane], bounds.k)):
                if hi > lo:
                    start = int(views.starts[part * bounds.size + self._group.rank])
                    out[pairs[lo:hi]] = raw(views.results[start : start + hi - lo])
        self._segment.check(self._generation)
        return y_PD

    def _take(self, lane: int, call: str) -> None:
        if self._generation != self._group.generation:
            raise RuntimeError(f"{call}: this exchange belongs to generation {self._generation}, its group moved on")
        self._turns.take(lane, call)


def _cut(pairs: NDArray[np.int64], ends: Sequence[int], k: int) -> list[tuple[int, int]]:
    """First and last of the pairs of each part."""
    if len(ends) == 1:
        return [(0, pairs.size)]
    return list(pairwise([0, *np.searchsorted(pairs, np.asarray(ends) * k).tolist()]))


class _Views:
    """One rank's regions of one lane as arrays."""

    def __init__(self, segment: Segment, rank: int, lane: int, wire: Wire) -> None:
        s = segment.shape

        def view(kind: type, at: int, *shape: int) -> NDArray[Any]:
            n = int(np.prod(shape))
            return np.frombuffer(segment.memory, kind, n, at).reshape(shape)

        n_results = s.n_ranks * s.max_tokens * s.k
        self.ends = view(np.int64, s.slots(rank, lane), MAX_PARTS)
        self.slots = view(np.int32, s.slots(rank, lane) + 8 * MAX_PARTS, s.max_tokens * s.k)
        self.rows = view(np.uint8, s.rows(rank, lane), s.max_tokens, wire.row_bytes)
        self.starts = view(np.int64, s.starts(rank, lane), MAX_PARTS * s.n_ranks)
        results = view(np.uint8, s.results(rank, lane), n_results, s.width * wire.results.itemsize)
        self.results = torch.from_numpy(results).view(wire.results)
