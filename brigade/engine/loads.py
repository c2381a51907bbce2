"""How often each routed expert of a unit was asked for, and what that means for its ranks. No clock, no messages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brigade.core.placement import Placement, busiest_over_mean, rank_loads
from brigade.engine.messages import Loads

KEEP = 0.5
"""Share of the loads before a look at them that still counts after it: a change of work shows within a few looks."""


@dataclass(frozen=True, slots=True)
class LayerLoads:
    """One layer with routed experts."""

    layer: int
    """The model's number of it."""
    tokens: list[int]
    """Of each expert: tokens routed to it since the server started."""
    recent: list[float]
    """The same, the older the less it counts: what placement goes by, and what the loads below are of."""
    slots: list[int]
    """Of each slot: the expert that it holds."""
    rank_loads: list[float]
    """Of each rank: the recent tokens that go to its slots, replicas of an expert sharing evenly."""
    rank_loads_before: list[float]
    """The same, if the experts were still where they were at the start."""
    busiest_over_mean: float
    """Of rank_loads; 1.0 is a perfect split."""
    busiest_over_mean_before: float
    received: list[int]
    """Of each rank: rows that it really computed since the last move, or the start."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What has moved since the server started."""

    experts: int
    """Slots that changed hands."""
    portions: int
    """A few layers' moves, made between two steps."""
    dropped: int
    """Portions that were not made, because a rank could not read its experts."""
    last: str | None
    """When the last one was made, as ISO 8601 in UTC."""


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """The experts of a unit: how busy they are and where they are."""

    n_ranks: int
    n_experts: int
    redundant: int
    rebalance: float
    """Seconds between two looks at the loads; 0: experts stay where they are."""
    rank_of_slot: list[int]
    busiest_over_mean: float
    """Busiest ranks of all layers over the mean ones, as the experts are placed now. 1.0 is a perfect split."""
    busiest_over_mean_before: float
    """The same, as they were placed at the start."""
    busiest_over_mean_received: float
    """The same, of the rows that ranks really computed since the last move, or the start."""
    moved: Moved
    layers: list[LayerLoads]


@dataclass(frozen=True, slots=True)
class UnitLoads:
    """The experts of one unit, or why they cannot be told now."""

    unit: str
    """Its name, as `brigade explain` has it: "decode-0"."""
    loads: ExpertLoads | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Experts:
    """What a server says of its experts."""

    units: list[UnitLoads]


class Ledger:
    """Counts of a unit's ranks, added up."""

    def __init__(self, n_layers: int, n_experts: int, n_ranks: int) -> None:
        self.tokens_LE = np.zeros((n_layers, n_experts), np.int64)
        self.received_LR = np.zeros((n_layers, n_ranks), np.int64)
        self._recent_LE = np.zeros((n_layers, n_experts))
        self._fresh_LE = np.zeros((n_layers, n_experts))

    def add(self, rank: int, loads: Loads) -> None:
        """Take what a rank has seen. Raises ValueError if it is of another model."""
        tokens_LE = np.array(loads.tokens, np.int64)
        if tokens_LE.shape != self.tokens_LE.shape or len(loads.received) != len(self.tokens_LE):
            raise ValueError(f"loads of {tokens_LE.shape} layers and experts, not {self.tokens_LE.shape}")
        self.tokens_LE += tokens_LE
        self._fresh_LE += tokens_LE
        self.received_LR[:, rank] += loads.received

    @property
    def recent_LE(self) -> list[list[float]]:
        """Loads to place experts by."""
        return (self._recent_LE + self._fresh_LE).tolist()  # type: ignore[no-any-return]

    def age(self) -> bool:
        """From now on, what was counted before counts less. False, and nothing changes, if there is nothing new."""
        if not self._fresh_LE.any():
            return False
        self._recent_LE = KEEP * (self._recent_LE + self._fresh_LE)
        self._fresh_LE[:] = 0
        return True

    def moved(self) -> None:
        """Experts have moved: what ranks received before tells nothing of the new placement."""
        self.received_LR[:] = 0

    def layers(self, first: int, now: Placement, before: Placement) -> list[LayerLoads]:
        """`first`: the model's number of the first layer."""
        recent = self.recent_LE
        loads_now, loads_before = rank_loads(recent, now), rank_loads(recent, before)
        ratios_now, ratios_before = busiest_over_mean(recent, now), busiest_over_mean(recent, before)
        return [
            LayerLoads(
                layer=first + i,
                tokens=self.tokens_LE[i].tolist(),
                recent=[round(x, 1) for x in recent[i]],
                slots=list(now.phy2log[i]),
                rank_loads=[round(x, 1) for x in loads_now[i]],
                rank_loads_before=[round(x, 1) for x in loads_before[i]],
                busiest_over_mean=round(ratios_now[i], 4),
                busiest_over_mean_before=round(ratios_before[i], 4),
                received=self.received_LR[i].tolist(),
            )
            for i in range(len(recent))
        ]


def ratio(loads_LR: Sequence[Sequence[float]]) -> float:
    """Busiest ranks of all layers over mean ones: ranks wait for each other in every layer. 1.0 without load."""
    total = sum(map(sum, loads_LR))
    return round(sum(max(x) * len(x) for x in loads_LR) / total, 4) if total else 1.0
