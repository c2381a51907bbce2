"""Two micro-batches in one step, so that the exchange of one runs behind the compute of the other: how a step is cut,
and whether it pays. Pure: every rank of a unit is fed the same numbers and so decides the same.

Cutting costs something, since each half reads the weights again; whether the exchange that is hidden is worth that
depends on the machine, the network and the step's size, so it is measured. For each size of step (powers of two):

1. After some steps there is a trial: pairs of one step cut and one not cut, in turn the one or the other first.
2. Two steps of a pair follow each other and have about the same size, so what differs between them is the cut.
3. The other way is taken if it was faster in all pairs but one, and by MARGIN in their median.
4. Until the next trial twice as many steps pass as before: it costs ever less, and cannot change to and fro.
"""

from dataclasses import dataclass, field, replace
from statistics import median

from brigade.core.scheduler import Slice, StepPlan

MOST = 2
"""Micro-batches of a step: the lanes that an exchange has."""
PAIRS = 7
MOST_PAIRS = 20
"""A trial whose steps are too unlike each other is given up after so many pairs."""
MARGIN = 0.97
ALIKE = 1 / 8
"""By how much the sizes of two steps of a pair may differ."""
FIRST_REST, LONGEST_REST = 32, 4096
"""Steps of a size before its first trial, and the most between two trials."""


def cut(plan: StepPlan, n: int) -> tuple[StepPlan, ...]:
    """A step as n micro-batches with about the same number of tokens, empty ones where there is too little to cut.

    They follow each other in the order of the slices, so a micro-batch may read pages that an earlier one fills. A
    chunk is cut in two if no end of a slice is near the middle. A token and the drafts after it stay together.
    """
    if not 1 <= n <= MOST:
        raise ValueError(f"n: a step is cut into 1 to {MOST} micro-batches, not {n}")
    if n == 1:
        return (plan,)
    total, before = plan.n_tokens, 0
    for i, s in enumerate(plan.slices):
        end = before + len(s.tokens)
        if 2 * end < total:
            before = end
            continue
        first = i if total - 2 * before < 2 * end - total else i + 1  # the nearer end of this slice
        off = min(total - 2 * before, 2 * end - total)
        if 8 * off <= total or len(s.tokens) == 1 or s.n_drafts:
            return StepPlan(plan.slices[:first]), StepPlan(plan.slices[first:])
        head, tail = _split(s, total // 2 - before)
        return StepPlan((*plan.slices[:i], head)), StepPlan((tail, *plan.slices[i + 1 :]))
    return plan, StepPlan()


def _split(s: Slice, n: int) -> tuple[Slice, Slice]:
    return (
        replace(s, tokens=s.tokens[:n], sample=False),
        replace(s, tokens=s.tokens[n:], start=s.start + n),
    )


@dataclass(frozen=True, slots=True)
class Way:
    """How a step runs."""

    n: int
    """Micro-batches."""
    n_tokens: int
    """Tokens of the busiest rank."""
    turn: int = -1
    """Its number in a trial."""


@dataclass(slots=True)
class _Size:
    """What is known about steps of one size."""

    n: int = 1
    """The way that is taken outside of trials."""
    rest: int = FIRST_REST
    left: int = FIRST_REST
    """Steps until the next trial."""
    turn: int = -1
    """Steps of the trial under way that were started; -1: there is none."""
    took: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(tokens, microseconds) of those that are done, by number."""


class Overlap:
    """Chooses the number of micro-batches of each step. One for each rank, all fed alike."""

    def __init__(self, n: int) -> None:
        """`n`: micro-batches of every step; 0: chosen by what is measured."""
        self._fixed = n
        self._sizes: dict[int, _Size] = {}

    def choose(self, n_tokens: int) -> Way:
        """For the next step, of which the busiest rank has so many tokens."""
        if self._fixed or n_tokens < 2:
            return Way(max(self._fixed, 1), n_tokens)
        size = self._sizes.setdefault(n_tokens.bit_length(), _Size())
        if size.turn < 0 and size.left:
            size.left -= 1
            return Way(size.n, n_tokens)
        size.turn += 1
        return Way(_of_turn(size.n, size.turn), n_tokens, size.turn)

    def learn(self, way: Way, microseconds: int) -> None:
        """How long a step took, on the rank that took longest. In the order of the steps."""
        size = self._sizes.get(way.n_tokens.bit_length())
        if size is None or way.turn < 0 or size.turn < 0:
            return
        size.took[way.turn] = (way.n_tokens, microseconds)
        ratios = _ratios(size.took)
        if len(ratios) < PAIRS and len(size.took) < 2 * MOST_PAIRS:
            return
        if len(ratios) == PAIRS and median(ratios) < MARGIN and sum(r < 1 for r in ratios) >= PAIRS - 1:
            size.n = MOST + 1 - size.n
        size.rest = size.left = min(2 * size.rest, LONGEST_REST)
        size.turn = -1
        size.took.clear()


def _of_turn(n: int, turn: int) -> int:
    """Micro-batches of a trial's step: pairs as usual and other, other and usual, and so on."""
    pair, second = divmod(turn, 2)
    return n if (pair + second) % 2 == 0 else MOST + 1 - n


def _ratios(took: dict[int, tuple[int, int]]) -> list[float]:
    """The other way's time over the usual one's, of each pair that is complete and alike."""
    out = []
    for turn in range(0, len(took) - 1, 2):
        usual, other = took[turn], took[turn + 1]
        if turn // 2 % 2:
            usual, other = other, usual
        if abs(usual[0] - other[0]) <= ALIKE * usual[0] and usual[1]:
            out.append(other[1] / usual[1])
    return out
