"""One rank's place in its unit: its number, the group it meets the others in, and the experts it holds."""

import torch

from brigade.comm.exchange import ExpertExchange
from brigade.comm.group import Alone, Group
from brigade.comm.segment import FIRST_GENERATION, Segment
from brigade.comm.shared import SharedExchange, SharedGroup
from brigade.core.placement import cut
from brigade.engine.messages import Form
from brigade.spec.model import ModelSpec

LOAD_DEADLINE = 600.0
"""Seconds that a rank which has loaded its weights waits for the others; who watches the processes gives up sooner."""


class UnitRank:
    """Rank `rank` of `size`. Made before the weights are read; `meet` when they are, and after each loss."""

    def __init__(self, rank: int, size: int, segment: int, deadline: float, redundant: int = 0) -> None:
        """`segment`: file number of the shared memory, -1 for a unit of one. `redundant`: slots of a layer beyond its
        experts. Raises ValueError."""
        self.rank, self.size, self._redundant = rank, size, redundant
        self._shared = SharedGroup(Segment.attach(segment), rank, deadline=deadline) if size > 1 else None
        self.generation = 0
        self.group: Group = self._shared or Alone()

    def bounds(self, spec: ModelSpec) -> tuple[int, ...]:
        """Which slots of a layer which rank has: rank r those from bounds[r] up to bounds[r + 1]. They never change."""
        n_slots = spec.moe.n_experts + self._redundant if spec.moe else 0
        return (0, *(held.stop for held in cut(n_slots, self.size)))

    @property
    def port(self) -> int:
        """Where this rank listens for ranks of other hosts; 0 where all are on one host."""
        return 0

    def meet(self, form: Form) -> None:
        """Wait until all ranks have come to the new generation. Raises PeerLost."""
        self.generation = form.generation
        if self._shared is not None:
            first = form.generation == FIRST_GENERATION
            self._shared.form(form.generation, LOAD_DEADLINE if first else None)

    def exchange(self, spec: ModelSpec, dtype: torch.dtype) -> ExpertExchange | None:
        """How rows reach the experts of other ranks; None where all experts are here. Call it after `meet`."""
        if self._shared is None or spec.moe is None:
            return None
        return SharedExchange(self._shared, self.bounds(spec), dtype)
