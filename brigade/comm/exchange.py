"""Expert exchange: rows go to the ranks that hold their experts, results come back. One row layout, many backends."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brigade.comm.wire import Wire

LANES = 2
"""Micro-batches that may be in flight."""


class ExpertExchange(Protocol):
    """Two calls, dispatch and combine, each cut into start and finish so that another micro-batch can compute between.

    **The row layout.** A *slot* is one physical expert; slots are numbered over the whole unit and rank r holds
    `bounds[r] <= slot < bounds[r + 1]` (ranges may be uneven or empty). A rank receives one row per (token, k) pair
    whose slot it holds, in the order of source rank, then token, then k:

        rank 0, slots_TK            rank 1, slots_TK           rank 1 holds slots 2..3 and gets
          token 0: [0, 3]             token 0: [3, 2]
          token 1: [2, 3]             token 1: [-1, 1]           rows_ND   (0,t0) (0,t1) (0,t1) (1,t0) (1,t0)
                                                                 slot_N      1      0      1      1      0
                                                                           '---- source 0 ----' '- source 1 -'

    `slot_N` is the slot less the rank's own first slot. A slot of -1 asks for nothing: its result is a row of zeros.

    Every rank makes the same calls in the same order, with any number of tokens, none included. In each lane the order
    is start_dispatch, finish_dispatch, start_combine, finish_combine; anything else is a RuntimeError. The lanes are
    independent. Every finish raises PeerLost at the deadline of its group. Rows and results arrive as exact copies, or
    rounded as the exchange's wire says (brigade.comm.wire), those of a rank's own experts like all others.

    Shapes: T own tokens, K slots of a token, N rows to compute here, D width.
    """

    def start_dispatch(self, lane: int, x_TD: Tensor, slots_TK: Tensor) -> None:
        """Offer own tokens: bfloat16 or float32 as the exchange was made for, and int32 slots (-1 for none).

        ValueError for a wrong shape or dtype, or a slot that no rank holds. `x_TD` may be reused when this returns.
        """
        ...

    def finish_dispatch(self, lane: int) -> tuple[Tensor, Tensor]:
        """(rows_ND, slot_N int32): what this rank must compute."""
        ...

    def start_combine(self, lane: int, y_ND: Tensor) -> None:
        """Give the results of rows_ND, float32, row by row. `y_ND` may be reused when this returns."""
        ...

    def finish_combine(self, lane: int) -> Tensor:
        """y_TKD float32: results for own tokens in the order of slots_TK, not weighted and not summed."""
        ...


class Bounds:
    """Which rank holds which slot, and the checks that all backends share."""

    def __init__(self, bounds: Sequence[int], size: int, k: int, wire: Wire) -> None:
        b = [int(i) for i in bounds]
        if len(b) != size + 1 or b[0] != 0 or any(hi < lo for lo, hi in pairwise(b)):
            raise ValueError(f"bounds: {size} ranks need {size + 1} ascending numbers from 0, not {b}")
        self.of, self.size, self.k, self.wire = b, size, k, wire
        self.width, self.dtype = wire.width, wire.dtype

    def check(self, x_TD: Tensor, slots_TK: Tensor) -> NDArray[np.int32]:
        """The slots as a flat array [T * K]. Raises ValueError."""
        if x_TD.dtype != self.dtype or x_TD.dim() != 2 or x_TD.shape[1] != self.width:
            raise ValueError(f"x: need {self.dtype} [T, {self.width}], not {x_TD.dtype} {list(x_TD.shape)}")
        if slots_TK.dtype != torch.int32 or slots_TK.shape != (x_TD.shape[0], self.k):
            raise ValueError(
                f"slots: need int32 [{x_TD.shape[0]}, {self.k}], not {slots_TK.dtype} {list(slots_TK.shape)}"
            )
        flat: NDArray[np.int32] = slots_TK.numpy().reshape(-1)
        if flat.size and (flat.min() < -1 or flat.max() >= self.of[-1]):
            raise ValueError(f"slots: must be -1 or below {self.of[-1]}, not {flat.min()}..{flat.max()}")
        return flat

    def pairs(self, flat: NDArray[np.int32], rank: int) -> NDArray[np.int64]:
        """Positions in flat slots [T * K] that `rank` computes, in the order of the row layout."""
        # one comparison in place of two: what is below the range wraps around to a large number
        local = (flat - np.int32(self.of[rank])).view(np.uint32)
        return (local < self.of[rank + 1] - self.of[rank]).nonzero()[0]

    def check_results(self, y_ND: Tensor, n_rows: int) -> None:
        if y_ND.dtype != torch.float32 or y_ND.shape != (n_rows, self.width):
            raise ValueError(f"y: need float32 [{n_rows}, {self.width}], not {y_ND.dtype} {list(y_ND.shape)}")

    def rows(self, n: int) -> tuple[Tensor, Tensor]:
        """Room for the rows of n pairs and for their slots."""
        return torch.empty(n, self.width, dtype=self.dtype), torch.empty(n, dtype=torch.int32)

    def results(self, flat: NDArray[np.int32]) -> Tensor:
        """Where results [T * K, D] of own tokens go, as they travel; zeros where a slot was -1."""
        full = not flat.size or bool(flat.min() >= 0)
        return (torch.empty if full else torch.zeros)(flat.size, self.width, dtype=self.wire.results)

    def given(self, y_PD: Tensor) -> Tensor:
        """Results [T, K, D] as the caller gets them."""
        return y_PD.float().view(-1, self.k, self.width)


class Turns:
    """Holds a lane to its order of calls."""

    ORDER = ("start_dispatch", "finish_dispatch", "start_combine", "finish_combine")

    def __init__(self) -> None:
        self._next = [0] * LANES

    def take(self, lane: int, call: str) -> None:
        if not 0 <= lane < LANES:
            raise ValueError(f"lane: there are lanes 0 to {LANES - 1}, not {lane}")
        due = self.ORDER[self._next[lane]]
        if call != due:
            raise RuntimeError(f"lane {lane}: {call} called where {due} is due")
        self._next[lane] = (self._next[lane] + 1) % len(self.ORDER)
