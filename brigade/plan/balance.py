"""How unevenly experts load ranks: from statistics of the loads, measured where there are any. Pure.

The busiest of R ranks, in units of the mean, is estimated as the expected maximum of R sums of x experts' loads
(extreme values of nearly normal variables; Gumbel 1958):

    phi = 1 + sqrt(2 ln R) x sqrt(spread^2 / x + 1 / rows)

`spread` is the standard deviation of one expert's load over its mean, x the experts on a rank, rows = the rows a rank
receives: the second term is the noise of sampling and stays when loads are perfectly balanced. Where experts are placed
by their loads, what is left is spread^2 = drift^2 + taste^2 / requests: loads move after they were counted, and each
request has experts of its own taste, which even out over many requests in a step (few long prompts, many decodes).
Without spare slots a hot expert stays whole, so phi is at least its load over a rank's mean. With counts of real loads
the first term is replaced by what core/placement.py makes of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import log, sqrt

from brigade.core.placement import busiest_over_mean, initial, place

SKEW = 1.0
"""Spread of expert loads nobody balances: it explains SGLang's 2.5x at EP72 (lmsys.org, 2025-05-05)."""


@dataclass(frozen=True)
class LoadStatistics:
    """What is known of expert loads."""

    spread: float = SKEW
    """Standard deviation over mean of the loads, over the time in which placement cannot follow."""
    drift: float | None = None
    """The same of what is left after balancing: loads move after they were counted. None: the calibrated value."""
    counts: tuple[tuple[float, ...], ...] = ()
    """Counted tokens by layer and expert; empty: unknown."""


def imbalance(
    n_ranks: int, per_rank: float, rows: float, loads: LoadStatistics, left: float, balanced: bool, spare: bool = True
) -> float:
    """Busiest rank over mean, for `per_rank` experts and `rows` received rows a rank; 1.0 on a single rank.

    balanced: experts are placed by their loads (EPLB), so that a spread of `left` remains; spare: there are slots for
    copies of hot experts.
    """
    if n_ranks <= 1:
        return 1.0
    spread = (left if loads.drift is None else loads.drift) if balanced else loads.spread
    noise = spread * spread / max(per_rank, 1e-9) + 1 / max(rows, 1e-9)
    phi = 1 + sqrt(2 * log(n_ranks) * noise)
    if not (balanced and spare) and spread:
        hottest = 1 + loads.spread * sqrt(2 * log(max(2.0, n_ranks * per_rank)))
        phi = max(phi, hottest / per_rank)
    return min(phi, float(n_ranks))


def left_after_placing(drift: float, taste: float, requests: float) -> float:
    """Spread of an expert's load that placement cannot foresee."""
    return sqrt(drift * drift + taste * taste / max(requests, 1.0))


@lru_cache(maxsize=4096)
def counted(counts: tuple[tuple[float, ...], ...], n_ranks: int, n_nodes: int, n_slots: int, balanced: bool) -> float:
    """Busiest rank over mean, averaged over layers, for counted loads placed as the server would place them."""
    sizes = {"n_slots": n_slots, "n_ranks": n_ranks, "n_nodes": n_nodes, "n_groups": 1}
    placement = place(counts, **sizes) if balanced else initial(len(counts), len(counts[0]), **sizes)
    ratios = busiest_over_mean(counts, placement)
    return sum(ratios) / len(ratios)
