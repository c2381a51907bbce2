"""What the ranks of a unit do together this step. Pure: every rank computes the same answer from all ranks' shapes.

Experts are spread over the ranks, so a step of one is a step of all: a rank with nothing to run still meets every
collective. When no rank has anything left, all of them sleep; a request then wakes all, not only the rank that runs it.
Wake calls carry a growing number. A rank sleeps only when all have heard the same last call: otherwise one of them
would sleep through a call that another one has already answered.

Experts may move between two steps: each rank reads in its own time what is to come to it, and all swap together once
all have read it. If one could not, all drop it.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """What one rank tells the others before a step."""

    n_tokens: int
    """Tokens of its plan; 0: it runs an empty one if the others run."""
    busy: bool
    """Whether requests or steps of it are unfinished."""
    wake: int
    """Number of the last wake call it has heard."""
    staged: int = 0
    """Number of the portion of expert moves that it has read and waits with, below zero if it could not; 0: none."""
    took: int = 0
    """Microseconds of the last step it committed; 0: there is none it has not told."""


class Agreed(NamedTuple):
    """What all ranks of a unit do now."""

    run: bool
    """Run a step, an empty one where there is nothing to do."""
    sleep: bool
    """Wait for the next wake call."""
    portion: int = 0
    """Before the step, this portion of experts changes places; below zero: it is dropped; 0: nothing of both."""


def agree(shapes: Sequence[Shape]) -> Agreed:
    """From the shapes of all ranks, in rank order. A unit may have one rank."""
    run = any(s.n_tokens for s in shapes)
    calls = {s.wake for s in shapes}
    staged = {abs(s.staged) for s in shapes}
    portion = min(s.staged for s in shapes) if len(staged) == 1 else 0
    return Agreed(run, not run and len(calls) == 1 and not any(s.busy for s in shapes), portion)
