"""Expert exchange over several hosts: a token's row crosses the network once per host that holds its experts.

1. A source sends the row to one rank of that host, its proxy: the rank with its own local index, or the host's first
   rank where hosts differ in size.
2. The proxy offers the row inside its host through shared memory, together with its own tokens.
3. Results return the same way: through shared memory to the proxy, over the mesh to the source.

Tokens keep their source's rank as their part, and rows inside a host are ordered by part first: the row layout is the
same as everywhere.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brigade.comm.exchange import LANES, Bounds, Turns
from brigade.comm.group import PeerLost
from brigade.comm.mesh import FIRST_FREE_CHANNEL, Mesh
from brigade.comm.shared import SharedExchange, SharedGroup
from brigade.comm.wire import Rows, Wire, raw

_DISPATCH, _COMBINE = FIRST_FREE_CHANNEL + 2 * LANES, FIRST_FREE_CHANNEL + 3 * LANES


class Hosts:
    """Ranks by host: `sizes[h]` consecutive ranks on host h. Pure."""

    def __init__(self, sizes: Sequence[int]) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"hosts: each needs at least one rank, not {list(sizes)}")
        self.first = [0, *accumulate(sizes)]
        self.n = len(sizes)
        self._even = len(set(sizes)) == 1

    def of(self, rank: int) -> int:
        return next(h for h in range(self.n) if rank < self.first[h + 1])

    def proxy(self, source: int, host: int) -> int:
        """Which rank of `host` receives for it what `source` sends."""
        return self.first[host] + (source - self.first[self.of(source)] if self._even else 0)

    def sources(self, rank: int) -> list[int]:
        """Ranks of other hosts that have `rank` as their proxy."""
        host = self.of(rank)
        return [s for s in range(self.first[-1]) if self.of(s) != host and self.proxy(s, host) == rank]


class HierarchicalExchange:
    """ExpertExchange of all ranks of a mesh; `local` is the group of those on this host, in the same order.

    The segment needs room for the tokens that a proxy receives besides its own: `max_tokens` times the number of hosts,
    or times all ranks where hosts differ in size. The local group's deadline must be within the mesh's `patience`.
    """

    def __init__(self, mesh: Mesh, local: SharedGroup, sizes: Sequence[int], bounds: Sequence[int], wire: Wire) -> None:
        self._bounds = Bounds(bounds, mesh.size, local.segment.shape.k, wire)
        self._hosts, self._mesh, self._turns = Hosts(sizes), mesh, Turns()
        first, host = self._hosts.first, self._hosts.of(mesh.rank)
        if first[-1] != mesh.size or first[host] + local.rank != mesh.rank or sizes[host] != local.size:
            raise ValueError(
                f"hosts: {list(sizes)} do not fit rank {mesh.rank} of {mesh.size}, {local.rank} on its host"
            )
        if local.deadline > mesh.patience:
            raise ValueError(f"local deadline: must be {mesh.patience:g} s at most, the mesh's patience")
        self._host, self._first, self._local = host, first[host], local
        inside = [b - bounds[self._first] for b in bounds[self._first : first[host + 1] + 1]]
        self._inside = SharedExchange(local, inside, wire, n_parts=mesh.size)
        self._sources = self._hosts.sources(mesh.rank)
        self._lanes = [_Lane() for _ in range(LANES)]

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor) -> None:
        flat = self._bounds.check(x_TD, slots_TK)
        self._turns.take(lane, "start_dispatch")
        at, slots = self._lanes[lane], flat.reshape(-1, self._bounds.k)
        at.flat, at.x = flat.copy(), self._bounds.wire.encode(x_TD).copy()
        for host in self._others():
            there = self._there(slots, host)
            tokens = np.flatnonzero((there >= 0).any(1))
            parts = (there[tokens], at.x[tokens])
            self._mesh.post(
                self._hosts.proxy(self._mesh.rank, host), _DISPATCH + lane, *(p.data for p in parts if p.size)
            )

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        self._turns.take(lane, "finish_dispatch")
        at, k, me = self._lanes[lane], self._bounds.k, self._mesh.rank
        came = self._mesh.collect(_DISPATCH + lane, self._sources)
        given = {me: (self._there(at.flat.reshape(-1, k), self._host), at.x)}
        given |= {source: self._read(source, came[source]) for source in self._sources}
        order = sorted(given)
        at.inside = np.concatenate([given[s][0] for s in order])
        counts = [len(given[s][0]) if s in given else 0 for s in range(self._mesh.size)]
        at.ends = list(accumulate(counts))
        self._inside.offer(lane, np.concatenate([given[s][1] for s in order]), at.inside.reshape(-1), at.ends)
        try:
            return self._inside.finish_dispatch(lane)
        except PeerLost as e:
            raise self._lost(e) from e

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        self._inside.start_combine(lane, y_ND)
        self._turns.take(lane, "start_combine")

    def finish_combine(self, lane: int) -> Tensor:
        self._turns.take(lane, "finish_combine")
        at, bounds, mesh = self._lanes[lane], self._bounds, self._mesh
        try:
            y_TKD = raw(self._inside.results(lane)).reshape(-1, bounds.k, bounds.width)
        except PeerLost as e:
            raise self._lost(e) from e
        held = []  # until collect has sent them
        for source in self._sources:
            lo, hi = at.ends[source - 1] if source else 0, at.ends[source]
            held.append(y_TKD[lo:hi][at.inside[lo:hi] >= 0])
            mesh.post(source, _COMBINE + lane, *(p.data for p in held[-1:] if p.size))
        proxies = {host: self._hosts.proxy(mesh.rank, host) for host in self._others()}
        came = mesh.collect(_COMBINE + lane, proxies.values())
        y_PD = bounds.results(at.flat)
        out = raw(y_PD)
        lo, hi = at.ends[mesh.rank - 1] if mesh.rank else 0, at.ends[mesh.rank]
        here = self._pairs(at.flat, self._host)
        out[here] = y_TKD[lo:hi].reshape(-1, bounds.width)[here]
        for host, proxy in proxies.items():
            pairs = self._pairs(at.flat, host)
            if len(came[proxy]) != out.itemsize * pairs.size * bounds.width:
                raise mesh.lost([proxy], f"sent {len(came[proxy])} bytes of results for {pairs.size} rows")
            out[pairs] = np.frombuffer(came[proxy], out.dtype).reshape(pairs.size, bounds.width)
        return bounds.given(y_PD)

    def _others(self) -> list[int]:
        return [h for h in range(self._hosts.n) if h != self._host]

    def _range(self, host: int) -> tuple[int, int]:
        return self._bounds.of[self._hosts.first[host]], self._bounds.of[self._hosts.first[host + 1]]

    def _there(self, slots: NDArray[np.int32], host: int) -> NDArray[np.int32]:
        """Slots counted from the host's first one; -1 for those of other hosts."""
        lo, hi = self._range(host)
        return np.where((slots >= lo) & (slots < hi), slots - lo, -1).astype(np.int32)

    def _pairs(self, flat: NDArray[np.int32], host: int) -> NDArray[np.int64]:
        lo, hi = self._range(host)
        return np.flatnonzero((flat >= lo) & (flat < hi))

    def _read(self, source: int, data: bytearray) -> tuple[NDArray[np.int32], Rows]:
        """(slots [n, K], rows [n]) that a source sent. Raises PeerLost for what is no dispatch."""
        k, row_bytes = self._bounds.k, self._bounds.wire.row_bytes
        n, rest = divmod(len(data), 4 * k + row_bytes)
        slots = np.frombuffer(data, np.int32, n * k).reshape(n, k)
        lo, hi = self._range(self._host)
        if rest or (n and (slots.min() < -1 or slots.max() >= hi - lo)):
            raise self._mesh.lost([source], f"sent {len(data)} bytes that are no dispatch")
        return slots, np.frombuffer(data, np.uint8, n * row_bytes, 4 * n * k).reshape(n, row_bytes)

    def _lost(self, error: PeerLost) -> PeerLost:
        """With ranks of the unit in place of those of the host. What the mesh knows comes first: a neighbour that does
        not arrive may have left because a rank elsewhere is lost."""
        self._mesh.look()
        ranks = [self._first + r for r in error.ranks]
        return self._mesh.lost(ranks, str(error)) if self._local.stopped else self._mesh.late(ranks)


class _Lane:
    """What a lane holds between its calls."""

    flat: NDArray[np.int32]
    x: Rows
    inside: NDArray[np.int32]
    ends: list[int]
