"""Runs the micro-batches of a step in turn, so that what one has sent off travels while another computes.

Each is a generator that yields where it would have to wait for other ranks. With two of them, in every layer:

    A: attention, send rows | B: attention, send rows | A: experts, send results | B: experts, send results | A: add ...

A is ahead of B in every layer, so B may read cache pages that A fills. All ranks run as many micro-batches, empty ones
too, and so make the same calls in the same order.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
InTurn = Generator[None, None, T]


def in_turn(parts: Sequence[InTurn[T]]) -> list[T]:
    """What each of them returns."""
    ends: dict[int, T] = {}
    while len(ends) < len(parts):
        for i, part in enumerate(parts):
            if i in ends:
                continue
            try:
                next(part)
            except StopIteration as end:
                ends[i] = end.value
    return [ends[i] for i in range(len(parts))]
