"""Expert exchange over a mesh: a token's row goes once to each rank that computes any of its experts.

dispatch   n_tokens, n_pairs | token of each pair | slot of each pair | rows [n_tokens]
combine    results [n_pairs, D]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brigade.comm.exchange import LANES, Bounds, Turns
from brigade.comm.mesh import FIRST_FREE_CHANNEL, Mesh
from brigade.comm.wire import Index, Rows, Wire, raw

_DISPATCH, _COMBINE = FIRST_FREE_CHANNEL, FIRST_FREE_CHANNEL + LANES
_Flat = NDArray[np.int32]


class MeshExchange:
    """ExpertExchange between hosts. Between start and finish only those bytes move that the kernel took."""

    def __init__(self, mesh: Mesh, bounds: Sequence[int], k: int, wire: Wire) -> None:
        self._bounds = Bounds(bounds, mesh.size, k, wire)
        self._mesh, self._turns = mesh, Turns()
        self._lanes = [_Lane() for _ in range(LANES)]

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor) -> None:
        flat = self._bounds.check(x_TD, slots_TK).copy()
        self._turns.take(lane, "start_dispatch")
        x = self._bounds.wire.encode(x_TD)
        at = self._lanes[lane]
        at.flat = flat
        at.pairs = [self._bounds.pairs(flat, r) for r in range(self._bounds.size)]
        for rank, pairs in enumerate(at.pairs):
            tokens, token_of_pair = np.unique(pairs // self._bounds.k, return_inverse=True)
            head = np.array([tokens.size, pairs.size], np.int32)
            rows = np.take(x, tokens, axis=0)
            if rank == self._mesh.rank:
                at.own = (token_of_pair, flat[pairs], rows)
            else:
                parts = (head, token_of_pair.astype(np.int32), flat[pairs], rows)
                self._mesh.post(rank, _DISPATCH + lane, *(p.data for p in parts if p.size))

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        self._turns.take(lane, "finish_dispatch")
        bounds, mesh, at = self._bounds, self._mesh, self._lanes[lane]
        came = mesh.collect(_DISPATCH + lane)
        parts = [at.own if r == mesh.rank else self._read(r, came[r]) for r in range(mesh.size)]
        at.starts = np.cumsum([0, *(slots.size for _, slots, _ in parts)])
        rows_ND, slot_N = bounds.rows(int(at.starts[-1]))
        slot = slot_N.numpy()
        for source, (token_of_pair, slots, rows) in enumerate(parts):
            lo, hi = at.starts[source : source + 2]
            if hi > lo:
                bounds.wire.decode(rows, token_of_pair, rows_ND[lo:hi])
                np.subtract(slots, bounds.of[mesh.rank], out=slot[lo:hi])
        return rows_ND, slot_N

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        at = self._lanes[lane]
        self._bounds.check_results(y_ND, int(at.starts[-1]))
        self._turns.take(lane, "start_combine")
        at.y = raw(y_ND.detach().to(self._bounds.wire.results, copy=True))
        for rank in range(self._mesh.size):
            if rank != self._mesh.rank:
                lo, hi = at.starts[rank : rank + 2]
                self._mesh.post(rank, _COMBINE + lane, at.y[lo:hi].data if hi > lo else b"")

    def finish_combine(self, lane: int) -> Tensor:
        self._turns.take(lane, "finish_combine")
        bounds, mesh, at = self._bounds, self._mesh, self._lanes[lane]
        came = mesh.collect(_COMBINE + lane)
        y_PD = bounds.results(at.flat)
        out = raw(y_PD)
        for rank, pairs in enumerate(at.pairs):
            if rank == mesh.rank:
                lo, hi = at.starts[rank : rank + 2]
                out[pairs] = at.y[lo:hi]
                continue
            if len(came[rank]) != out.itemsize * pairs.size * bounds.width:
                raise mesh.lost([rank], f"sent {len(came[rank])} bytes of results for {pairs.size} rows")
            out[pairs] = np.frombuffer(came[rank], out.dtype).reshape(pairs.size, bounds.width)
        return bounds.given(y_PD)

    def _read(self, rank: int, data: bytearray) -> tuple[Index, _Flat, Rows]:
        """(token of each pair, slot of each pair, rows) that a rank sent. Raises PeerLost for what is no dispatch."""
        bounds = self._bounds
        n_tokens, n_pairs = (int(n) for n in np.frombuffer(data, np.int32, 2)) if len(data) >= 8 else (-1, -1)
        want = 8 + 8 * n_pairs + n_tokens * bounds.wire.row_bytes
        if min(n_tokens, n_pairs) < 0 or len(data) != want:
            raise self._mesh.lost([rank], f"sent {len(data)} bytes for {n_tokens} tokens and {n_pairs} rows")
        tokens = np.frombuffer(data, np.int32, n_pairs, 8)
        slots = np.frombuffer(data, np.int32, n_pairs, 8 + 4 * n_pairs)
        rows = np.frombuffer(data, np.uint8, n_tokens * bounds.wire.row_bytes, 8 + 8 * n_pairs)
        lo, hi = bounds.of[self._mesh.rank], bounds.of[self._mesh.rank + 1]
        if n_pairs and not (tokens.min() >= 0 and tokens.max() < n_tokens and lo <= slots.min() and slots.max() < hi):
            raise self._mesh.lost([rank], "sent rows for experts that are not here")
        return tokens.astype(np.int64), slots, rows.reshape(n_tokens, bounds.wire.row_bytes)


class _Lane:
    """What a lane holds between its calls. Buffers stay here while the mesh sends them."""

    flat: _Flat
    pairs: list[NDArray[np.int64]]
    own: tuple[Index, _Flat, Rows]
    y: NDArray[Any]

    def __init__(self) -> None:
        self.starts: NDArray[np.int64] = np.zeros(1, np.int64)
