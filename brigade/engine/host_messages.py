"""What the head and the supervisor of another host say to each other. msgspec structs: typed, checked, never pickle.

A host may have ranks of several units. `unit` in a message is the number of the one that it is about.

1. Terms from the head, Join from the host, then Joined or Refusal. These four never change between versions: they are
   how two versions tell each other that they differ.
2. Begin, StartRank..., orders one way, Heard and RankEnded the other way, EndRanks and RanksEnded.
3. Begin again for the next unit, or Goodbye.
"""

import msgspec

from brigade.engine.config import EngineConfig
from brigade.engine.messages import FromWorker, Start, ToWorker


class Terms(msgspec.Struct, frozen=True, tag=True):
    """What the head runs, by the names of `brigade.engine.terms`."""

    values: dict[str, str]
    clock: float
    """Seconds since 1970."""
    model: str
    """The head's model folder, for hosts that were not given another one; empty: the bundled model."""


class Join(msgspec.Struct, frozen=True, tag=True):
    """A host of the layout is here and states its own terms."""

    address: str
    values: dict[str, str]
    clock: float


class Joined(msgspec.Struct, frozen=True, tag=True):
    """Orders will follow."""


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The host cannot be part of this unit."""

    text: str
    again: bool = False
    """Whether it may be otherwise in a moment."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """A unit anew: make the memory that its ranks here share."""

    unit: int
    config: EngineConfig
    layouts: list[list[tuple[str, int]]]
    """Of every unit: address and number of ranks of every host."""


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """Start a process for a rank that has none."""

    unit: int
    start: Start


class ToRank(msgspec.Struct, frozen=True, tag=True):
    unit: int
    rank: int
    messages: list[ToWorker]


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End all waits of this generation."""

    unit: int
    generation: int
    culprits: list[int]


class KillRank(msgspec.Struct, frozen=True, tag=True):
    unit: int
    rank: int


class EndRanks(msgspec.Struct, frozen=True, tag=True):
    """The unit is over; RanksEnded follows."""

    unit: int


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The head ends in good order."""

    text: str
    failed: bool = False


class Heard(msgspec.Struct, frozen=True, tag=True):
    """What a rank said."""

    unit: int
    rank: int
    message: FromWorker


class RankEnded(msgspec.Struct, frozen=True, tag=True):
    unit: int
    rank: int
    how: str


class RanksEnded(msgspec.Struct, frozen=True, tag=True):
    """All processes of the unit are gone: how those ended that had not ended before."""

    unit: int
    how: dict[int, str]


ToSupervisor = Terms | Joined | Refusal | Begin | StartRank | ToRank | Stop | KillRank | EndRanks | Goodbye
FromSupervisor = Join | Heard | RankEnded | RanksEnded
