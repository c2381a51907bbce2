"""How a model reaches its routed experts, wherever they are, and how often it asks for each. Must not know processes.

Logical expert ids become slots by a table for each layer (core/placement.py), slots become rows on other ranks by the
exchange, and results come back in the order of the ids: which replica computed a row changes nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brigade.comm.exchange import LANES, ExpertExchange
from brigade.core.placement import Placement, replicas_for
from brigade.spec.model import ModelSpec

WIDTH = 8
"""Tokens after which the choice among an expert's replicas repeats."""


class Table:
    """One layer's way from logical experts to slots, as one rank sees it. -1, no expert, becomes no slot."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        """`rows`: [logical expert][width], as replicas_for gives them."""
        self._width = WIDTH if any(len(set(row)) > 1 for row in rows) else 1
        width = self._width
        # Index -1 is the last row: no expert. So are -8 to -1 where a row has eight places.
        self._flat = np.array([*(row[:width] for row in rows), [-1] * width], np.int32).ravel()
        self._next = 0

    def slots(self, ids_TK: NDArray[Any]) -> NDArray[np.int32]:
        """int32 [T, K]. A token's number decides which replica of its experts it goes to."""
        if self._width == 1:
            return self._flat.take(ids_TK)
        n = len(ids_TK)
        turn_T = np.arange(self._next, self._next + n) % self._width
        self._next = (self._next + n) % self._width
        return self._flat.take(ids_TK * self._width + turn_T[:, None])


class Spread:
    """The routed experts of all layers as one rank's model calls them: offer, take, give, results, in this order in
    each lane, with other work in between.

    A rank that holds all experts itself has no exchange: it only counts.
    """

    def __init__(self, spec: ModelSpec, rank: int = 0, placement: Placement | None = None) -> None:
        """`placement`: of experts in the slots that an exchange counts; None where there is no exchange."""
        if spec.moe is None:
            raise ValueError("a model without routed experts has nothing to spread")
        self._rank, self._first, n_layers = rank, spec.n_dense, spec.n_moe
        self.exchange: ExpertExchange | None = None
        self.counts_LE = np.zeros((n_layers, spec.moe.n_experts), np.int64)
        """Own tokens that went to each logical expert, by layer with experts."""
        self.received_L = np.zeros(n_layers, np.int64)
        """Rows that this rank's slots have computed for all ranks."""
        self._told = (self.counts_LE.copy(), self.received_L.copy())
        self._layer = [0] * LANES
        self.tables = [self.table(placement, layer) for layer in range(n_layers)] if placement else []

    def table(self, placement: Placement, layer: int) -> Table:
        """The table of a placement's layer, to be put into `tables` between two steps."""
        return Table(replicas_for(placement, layer, self._rank, width=WIDTH))

    def count(self, layer: int, ids_TK: Tensor) -> None:
        """Note which experts the tokens of this model layer were routed to."""
        self._count(layer - self._first, ids_TK.numpy())

    def news(self) -> tuple[list[list[int]], list[int]]:
        """(counts_LE, received_L) since the last time. From any one thread, also beside a step."""
        now = self.counts_LE.copy(), self.received_L.copy()
        counts_LE, received_L = now[0] - self._told[0], now[1] - self._told[1]
        self._told = now
        return counts_LE.tolist(), received_L.tolist()

    def offer(self, layer: int, x_TD: Tensor, ids_TK: Tensor, lane: int = 0) -> None:
        """Count own tokens and send their rows off. ids_TK: logical experts, -1 for none."""
        i, ids = layer - self._first, ids_TK.numpy()
        self._count(i, ids)
        self._layer[lane] = i
        self._lanes.start_dispatch(lane, x_TD, torch.from_numpy(self.tables[i].slots(ids)))

    def take(self, lane: int = 0) -> tuple[Tensor, Tensor]:
        """(rows_ND, own slot of each): what this rank must compute."""
        rows_ND, slot_N = self._lanes.finish_dispatch(lane)
        self.received_L[self._layer[lane]] += len(slot_N)
        return rows_ND, slot_N

    def give(self, y_ND: Tensor, lane: int = 0) -> None:
        """The results of what `take` gave, float32."""
        self._lanes.start_combine(lane, y_ND)

    def results(self, lane: int = 0) -> Tensor:
        """y_TKD float32 for what `offer` sent, in the order of the ids."""
        return self._lanes.finish_combine(lane)

    @property
    def _lanes(self) -> ExpertExchange:
        if self.exchange is None:
            raise RuntimeError("all experts are on this rank; nothing is exchanged")
        return self.exchange

    def _count(self, i: int, ids: NDArray[Any]) -> None:
        of_expert = np.bincount(ids.ravel() + 1, minlength=self.counts_LE.shape[1] + 1)
        self.counts_LE[i] += of_expert[1:]
