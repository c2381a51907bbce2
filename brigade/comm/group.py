"""Ranks that call the same collectives in the same order. Imports no torch: a supervisor reads this, too."""

from collections.abc import Iterable, Sequence
from typing import Protocol

MAX_SHARED = 64
"""Most integers that one rank may share in one call."""


class PeerLost(ConnectionError):
    """A collective cannot be completed. `ranks` are those that did not arrive, or that the supervisor gave up."""

    def __init__(self, ranks: Iterable[int], why: str) -> None:
        self.ranks, self.why = tuple(sorted(set(ranks))), why
        who = ", ".join(str(r) for r in self.ranks)
        names = f"rank {who}" if len(self.ranks) == 1 else f"ranks {who}" if self.ranks else "the group"
        super().__init__(f"{names}: {why}")


class Group(Protocol):
    """The ranks of a unit. After a PeerLost the group is of no more use: it must be formed anew."""

    rank: int
    size: int

    def share(self, ints: Sequence[int]) -> list[tuple[int, ...]]:
        """All-gather: what every rank said, in rank order. Up to 64 signed 64-bit integers each, lengths may differ.

        Blocks until every rank has called. Raises PeerLost at the group's deadline, which names the ranks that did not
        come, or at once when the group was told to stop. ValueError for too many integers or too large ones.
        """
        ...

    def close(self) -> None: ...


class Alone:
    """The group of one rank: nothing to wait for."""

    rank = 0
    size = 1

    def share(self, ints: Sequence[int]) -> list[tuple[int, ...]]:
        return [checked(ints)]

    def close(self) -> None:
        pass


def checked(ints: Sequence[int]) -> tuple[int, ...]:
    """`ints` if they may be shared. Raises ValueError."""
    if len(ints) > MAX_SHARED:
        raise ValueError(f"share takes up to {MAX_SHARED} integers, not {len(ints)}")
    out = tuple(int(i) for i in ints)
    if any(not -(1 << 63) <= i < 1 << 63 for i in out):
        raise ValueError("share takes signed 64-bit integers")
    return out


def checked_deadline(seconds: float) -> float:
    """A deadline in seconds; there is no group that waits for ever. Raises ValueError."""
    if not 0 < seconds < float("inf"):
        raise ValueError(f"deadline: give seconds above 0, not {seconds}")
    return seconds
