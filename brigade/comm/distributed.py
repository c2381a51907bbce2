"""Group and expert exchange over a process group of torch.distributed: the plain reference of the row layout.

Gloo does not say who is missing. So ranks that see an error report to the store, which a supervisor holds and which
outlives every rank; those that have not reported shortly afterwards are the lost ones.
"""

import contextlib
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import AllToAllOptions, PrefixStore, ProcessGroupGloo, Store

from brigade.comm.exchange import LANES, Bounds, Turns
from brigade.comm.group import MAX_SHARED, PeerLost, checked, checked_deadline
from brigade.comm.wire import Rows, Wire, raw

_OF_DEADLINE = 0.6
"""Share of the deadline that a collective gets; what is left is for finding out who is lost."""


class DistributedGroup:
    """Ranks over gloo. Forming it anew means a new object with another `prefix` on the same store."""

    def __init__(self, store: Store, prefix: str, rank: int, size: int, *, deadline: float) -> None:
        """Blocks until all ranks of `prefix` have come, or raises PeerLost, which names those that have not."""
        if not 0 <= rank < size:
            raise ValueError(f"rank: must be 0 to {size - 1}, not {rank}")
        self.rank, self.size, self.deadline = rank, size, checked_deadline(deadline)
        self._store = PrefixStore(prefix, store)
        self._store.set(f"here/{rank}", "1")
        missing = self._missing("here", self.deadline)
        if missing:
            raise PeerLost(missing, f"did not come to {prefix} within {deadline:g} s")
        span = timedelta(seconds=_OF_DEADLINE * self.deadline)
        try:
            self._group: Any = ProcessGroupGloo(self._store, rank, size, span)
        except RuntimeError as e:
            raise self.lost(e) from e

    def share(self, ints: Sequence[int]) -> list[tuple[int, ...]]:
        mine = torch.zeros(1 + MAX_SHARED, dtype=torch.int64)
        said = checked(ints)
        mine[0] = len(said)
        mine[1 : 1 + len(said)] = torch.tensor(said, dtype=torch.int64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            self._group.allgather([every], [mine]).wait()
        except RuntimeError as e:
            raise self.lost(e) from e
        return [tuple(row[1 : 1 + row[0]]) for row in (t.tolist() for t in every)]

    def all_to_all(self, out: Tensor, data: Tensor, out_splits: list[int], splits: list[int]) -> dist.Work:
        """Start `all_to_all_single` with uneven splits of the first axis. `finish` waits for it."""
        try:
            work: dist.Work = self._group.alltoall_base(out, data, out_splits, splits, AllToAllOptions())
            return work
        except RuntimeError as e:
            raise self.lost(e) from e

    def finish(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as e:
            raise self.lost(e) from e

    def lost(self, error: RuntimeError) -> PeerLost:
        """Who is lost after `error`, from the reports of those who are not."""
        try:
            self._store.set(f"error/{self.rank}", "1")
            missing = self._missing("error", (1 - _OF_DEADLINE) * self.deadline * 0.75)
        except RuntimeError as e:
            return PeerLost((), f"the store is gone: {e}")
        why = str(error).splitlines()[0][:120]
        if not missing:
            return PeerLost((), f"a collective failed, though every rank is there ({why})")
        return PeerLost(missing, f"did not arrive within {self.deadline:g} s ({why})")

    def _missing(self, what: str, seconds: float) -> list[int]:
        """Ranks that have not set `what` in the store within that time."""
        until = time.monotonic() + seconds
        missing = [r for r in range(self.size) if r != self.rank]
        while missing:
            missing = [r for r in missing if not self._store.check([f"{what}/{r}"])]
            if time.monotonic() >= until:
                break
            time.sleep(0.005)
        return missing

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._group.shutdown()


class DistributedExchange:
    """ExpertExchange by collectives. A row travels once per (token, k) pair. finish_dispatch holds two of its three
    collectives, since sizes must be known first: this is the reference, not the fast way."""

    def __init__(self, group: DistributedGroup, bounds: Sequence[int], k: int, wire: Wire) -> None:
        self._bounds = Bounds(bounds, group.size, k, wire)
        self._group, self._turns = group, Turns()
        self._lanes = [_Lane() for _ in range(LANES)]

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor) -> None:
        flat = self._bounds.check(x_TD, slots_TK).copy()
        self._turns.take(lane, "start_dispatch")
        at = self._lanes[lane]
        ranks = range(self._group.size)
        pairs = [self._bounds.pairs(flat, r) for r in ranks]
        order = np.concatenate(pairs)
        at.flat, at.order, at.sent = flat, order, [p.size for p in pairs]
        at.rows = self._bounds.wire.encode(x_TD).take(order // self._bounds.k, axis=0)
        at.counts = torch.empty(self._group.size, dtype=torch.int64)
        one = [1] * self._group.size
        at.data = torch.tensor(at.sent, dtype=torch.int64)
        at.work = self._group.all_to_all(at.counts, at.data, one, one)

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        self._turns.take(lane, "finish_dispatch")
        at, group, bounds = self._lanes[lane], self._group, self._bounds
        group.finish(at.work)
        at.got = at.counts.tolist()
        rows_ND, slot_N = bounds.rows(sum(at.got))
        came = torch.empty(len(rows_ND), bounds.wire.row_bytes, dtype=torch.uint8)
        slots = torch.from_numpy(at.flat[at.order])
        group.finish(group.all_to_all(slot_N, slots, at.got, at.sent))
        group.finish(group.all_to_all(came, torch.from_numpy(at.rows), at.got, at.sent))
        bounds.wire.decode(came.numpy(), np.arange(len(came)), rows_ND)
        return rows_ND, slot_N.sub_(bounds.of[group.rank])

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        at = self._lanes[lane]
        self._bounds.check_results(y_ND, sum(at.got))
        self._turns.take(lane, "start_combine")
        at.data = y_ND.detach().to(self._bounds.wire.results, copy=True)
        at.back = torch.empty(at.order.size, self._bounds.width, dtype=at.data.dtype)
        at.work = self._group.all_to_all(at.back, at.data, at.sent, at.got)

    def finish_combine(self, lane: int) -> Tensor:
        self._turns.take(lane, "finish_combine")
        at = self._lanes[lane]
        self._group.finish(at.work)
        y_PD = self._bounds.results(at.flat)
        raw(y_PD)[at.order] = raw(at.back)
        return self._bounds.given(y_PD)


class _Lane:
    """What a lane holds between its calls. Buffers stay here while a collective reads or fills them."""

    flat: NDArray[np.int32]
    order: NDArray[np.int64]
    sent: list[int]
    got: list[int]
    rows: Rows
    counts: Tensor
    data: Tensor
    back: Tensor
    work: dist.Work

    def __init__(self) -> None:
        self.got = []
