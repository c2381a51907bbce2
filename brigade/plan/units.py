"""Units worth a look: every grid of some nodes, and each at its best operating point within the promise.

A grid is dropped when its weights do not fit, then when even its bound (no latency, no imbalance) is slower than the
best alike. A unit's operating point is the largest batch that keeps the time per token, or the prompts per second that
keep the time to first token at the planned load.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, log

from brigade.plan.memory import memory
from brigade.plan.quantity import Servers
from brigade.plan.rates import Calibration, Rates
from brigade.plan.serving import (
    CHUNK,
    DESIGN_LOAD,
    LENGTHS,
    P90,
    Curve,
    Pool,
    Served,
    Workload,
    accept_of,
    gated,
    gathering,
    largest,
    mixed,
    occupied,
    prefill_time,
    steady,
    step_of,
)
from brigade.plan.step import Setup, decode_step, prefill_step, tokens_per_step
from brigade.spec.layout import Role
from brigade.spec.work import Facts, Grid

MOST_BATCH = 1024.0
"""Requests of a replica in one step at most: no engine goes further."""
BATCHED = 4096
"""Tokens that short prompts are gathered to in one prefill step under load."""
MOST_TOGETHER = 64
"""Prompts of one such step at most: a common bound of requests that run at once."""
FEWER = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85)
"""Shares of the largest batch at which a decode unit is known, for layouts whose prefill units bind."""
REFINED = 4
"""Times an operating point is looked for again with its own step added to the curve of steps."""
TAIL = 1 + P90 * LENGTHS
"""p90 over mean of the time per token where prefills do not interfere."""


@dataclass(frozen=True)
class Slo:
    """What users are promised at p90, in seconds."""

    tpot: float
    ttft: float


@dataclass(frozen=True)
class Unit:
    """One kind of unit at its best operating point."""

    role: Role
    """'mixed', 'prefill' or 'decode'."""
    nodes: float
    pool: Pool
    users: float
    """Requests it holds while it keeps the promise: in decoding (decode), or in all (mixed)."""
    rate: float
    """Requests per second."""
    tpot: float
    ttft: float
    limit: str
    """What binds: 'kv memory', 'tpot', 'ttft' or 'batch'."""
    below: tuple[tuple[float, float], ...] = ()
    """Of a decode unit: requests per second and requests in it at smaller batches, which take less time a token."""

    def inside(self, rate: float) -> float:
        """Requests that decode in it at `rate` requests per second; at most `users`."""
        if rate >= self.rate:
            return self.users
        i = bisect_right(self.below, (rate, float("inf")))
        low_rate, low = self.below[i - 1] if i else (0.0, 0.0)
        high_rate, high = self.below[i] if i < len(self.below) else (self.rate, self.users)
        return low + (high - low) * (rate - low_rate) / max(high_rate - low_rate, 1e-12)

    @property
    def grid(self) -> Grid:
        return self.pool.grid


@dataclass(frozen=True)
class Units:
    """What the search combines, of one kind of servers."""

    prefill: tuple[Unit, ...]
    decode: tuple[Unit, ...]
    mixed: tuple[Unit, ...]
    n_tried: int
    n_dropped_memory: int
    n_dropped_bound: int


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def grids(f: Facts, fleet: Servers) -> Iterator[tuple[float, Grid]]:
    """Nodes and grid of every unit worth a look."""
    g = fleet.per_node
    domain = min(g, fleet.device.domain)
    for nodes in range(1, fleet.n + 1):
        n = nodes * g
        if n > max(g, 2 * f.n_experts):
            break  # every expert has two ranks of its own: more would only wait for each other
        if not f.n_moe:
            if nodes == 1:
                for tp in divisors(g):
                    yield 1, Grid(g, domain, tp, 1)
            continue
        near = n if fleet.device.domain >= n else g
        for tp in divisors(g):
            for spare in spares(f.n_experts, n):
                yield nodes, Grid(n, near, tp, n, spare)
            if nodes == 1 and tp == g:
                yield 1, Grid(g, near, g, 1)
    yield from pipelines(f, fleet)


MOST_STAGES = 8


def pipelines(f: Facts, fleet: Servers) -> Iterator[tuple[float, Grid]]:
    """Pipelines over nodes, a stage on each: attention TP over the node's accelerators or a replica on each of them."""
    g = fleet.per_node
    near = min(g, fleet.device.domain)
    for nodes in range(2, min(fleet.n, MOST_STAGES, f.n_layers) + 1):
        n = nodes * g
        yield nodes, Grid(n, near, g, 1, pp=nodes)
        if f.n_moe and g > 1:
            spare = spares(f.n_experts, g)[0]
            yield nodes, Grid(n, near, g, g, spare, pp=nodes)
            yield nodes, Grid(n, near, 1, g, spare, pp=nodes)


def spares(n_experts: int, ep: int) -> list[int]:
    """Spare expert slots: as few as fill the ranks evenly, and one more on each rank; one rank alone needs none."""
    if ep == 1:
        return [0]
    per_rank = ceil(n_experts / ep)
    return [s * ep - n_experts for s in (per_rank, per_rank + 1) if s * ep <= 2 * n_experts + ep]


def setups(f: Facts, can_draft: bool, loads: Setup) -> list[Setup]:
    base = replace(loads, overlap=bool(f.n_moe))
    return [base, replace(base, draft=1)] if can_draft else [base]


@lru_cache(maxsize=64)
def peak_rates() -> Rates:
    """Rates that no software reaches: every share 1, no latency, no imbalance. Bounds follow from them."""
    return Rates(
        gemm=1, gemm4=1, gemm_decode=1, falloff=0, memory=1, host_memory=1, stream=1, tile=0, core_decode=1,
        core_prefill=1, passes=0, up=1, fan=1, out=1, draft_ms=0, layer_us=0, host_ms=0, exchange_us=0, near_us=0,
        reduce_us=0, hidden=0, drift=0, taste=0, mixing=0, ttft_ms=0, chunk_us=0,
    )  # fmt: skip


def floor_tpot(f: Facts, fleet: Servers, w: Workload, can_draft: bool) -> float:
    """Seconds per token that no layout of these servers can beat: one request at peak rates."""
    best = float("inf")
    for _, grid in grids(f, fleet):
        step = decode_step(f, grid, fleet.device, peak_rates(), 1 / grid.dp, w.context, Setup(perfect=True))
        best = min(best, step.seconds / (2 if can_draft else 1))
    return best


def floor_ttft(f: Facts, fleet: Servers, w: Workload, c: Calibration) -> float:
    """Seconds to the first token that no layout of these servers can beat: one prompt at peak rates, or the share of
    its time that engines were found to take to the first token."""
    peak = Calibration(peak_rates())
    pools = (Pool(f, grid, fleet.device, Setup(perfect=True)) for _, grid in grids(f, fleet))
    return min(1.0, c.rates.alone) * min((prefill_time(pool, peak, w)[0] for pool in pools), default=float("inf"))


def decode_unit(pool: Pool, nodes: float, c: Calibration, w: Workload, slo: Slo, steps: Curve) -> Unit | None:
    """The largest batch within the promise, or None where not even one request is."""
    room = min(pool.capacity(w.context), MOST_BATCH)
    per = tokens_per_step(pool.setup.draft, accept_of(pool.setup, c.rates))
    factor = pool.factor(c, "decode") / per

    def tpot(batch: float) -> float:
        return steps(batch).seconds * factor

    def most() -> float:
        return largest(lambda b: tpot(b) * TAIL <= slo.tpot, room)

    batch = most()
    for _ in range(REFINED):
        if steps.is_exact_at(batch):
            break
        batch = most()
    if batch * pool.grid.dp < 1:
        return None
    t, dp = tpot(batch), pool.grid.dp
    users = batch * dp
    limit = "tpot" if batch < room * 0.99 else "kv memory" if room < MOST_BATCH else "batch"
    below = tuple((b * dp / (w.n_out * tpot(b)), b * dp) for b in (batch * share for share in FEWER))
    return Unit("decode", nodes, pool, users, users / (w.n_out * t), t, 0.0, limit, below)


def first_token(pool: Pool, c: Calibration, w: Workload) -> tuple[float, float]:
    """Seconds to the first token on a prefill unit at the planned load: mean and p90."""
    alone, _ = prefill_time(pool, c, w)
    transfer = c.rates.transfer * w.n_in * pool.f.kv_bytes / (pool.device.nic * c.rates.out) / pool.grid.tp
    late = c.ttft_factor(pool.engine, pool.device.name, apart=True) * gathering(pool, c)
    base = (c.rates.ttft_ms * 1e-3 + c.rates.alone_apart * alone + transfer) * late
    wait = c.rates.waiting * occupied(pool, alone, w) / pool.grid.dp * DESIGN_LOAD / (2 * (1 - DESIGN_LOAD))
    # the longest of ten: the end of the gate, and the queue's tail
    return base + wait, base + 0.8 * gated(base, pool, c) + wait / DESIGN_LOAD * log(DESIGN_LOAD / 0.1)


def gathered(pool: Pool, c: Calibration, w: Workload) -> float:
    """Seconds that a replica is busy with each prompt under load, when short ones are computed in one step."""
    together = max(1, min(MOST_TOGETHER, round(BATCHED / w.computed)))
    tokens = w.computed * together
    if tokens > CHUNK:
        return occupied(pool, prefill_time(pool, c, w)[0], w)
    step = prefill_step(pool.f, pool.grid, pool.device, c.rates, tokens, w.computed, w.n_in - w.computed, pool.setup)
    return step.seconds * pool.factor(c, "prefill") / together / pool.grid.pp


def computes(pool: Pool, w: Workload) -> bool:
    """Whether a prefill unit has room for a prompt, or for a chunk of it."""
    return memory(pool.f, pool.grid, pool.device).tokens >= min(CHUNK, w.n_in)


def prefill_unit(pool: Pool, nodes: float, c: Calibration, w: Workload, slo: Slo) -> Unit | None:
    """Prompts per second at the planned load, or None where one prompt alone takes too long."""
    ttft, p90 = first_token(pool, c, w)
    if p90 > slo.ttft or not computes(pool, w):
        return None
    busy = gathered(pool, c, w)
    rate = DESIGN_LOAD * pool.grid.dp / busy
    return Unit("prefill", nodes, pool, 0.0, rate, 0.0, ttft, "ttft")


def mixed_unit(pool: Pool, nodes: float, c: Calibration, w: Workload, slo: Slo, steps: Curve) -> Unit | None:
    """The most users of a unit that does both within the promise."""
    dp = pool.grid.dp
    room = min(pool.capacity(w.context), MOST_BATCH)
    if room * dp < 1:
        return None
    alone = prefill_time(pool, c, w)
    if alone[0] > slo.ttft:
        return None

    def at(users: float) -> Served:
        return mixed(pool, c, replace(w, users=max(users, 1e-3)), steps=steps, alone=alone)

    def ok(users: float) -> bool:
        s = at(users)
        return s.tpot_quantile(P90) <= slo.tpot and s.ttft_quantile(0.9) <= slo.ttft and s.load <= DESIGN_LOAD

    users = largest(ok, room * dp)
    s = at(users)
    for _ in range(REFINED):
        if steps.is_exact_at(s.running):
            break
        users = largest(ok, room * dp)
        s = at(users)
    if users < 1:
        return None
    limit = _limit_of(s, users, room * dp, slo)
    return Unit("mixed", nodes, pool, users, s.rate, s.tpot, s.ttft, limit)


def _limit_of(s: Served, users: float, room: float, slo: Slo) -> str:
    """What keeps a mixed unit from more users."""
    if users > 0.99 * room:
        return "kv memory"
    if s.ttft_quantile(0.9) > 0.93 * slo.ttft:
        return "ttft"
    return "tpot" if s.tpot_quantile(P90) > 0.95 * slo.tpot else "prefill load"


def units_of(
    f: Facts,
    fleet: Servers,
    engine: str,
    c: Calibration,
    w: Workload,
    slo: Slo,
    can_draft: bool,
    loads: Setup,
    families: tuple[str, ...],
    wanted: Callable[[Grid], bool] = lambda _: True,
) -> Units:
    """All units of these servers that keep the promise, of the grids that are wanted."""
    c = steady(c)
    decode: list[Unit] = []
    prefill: list[Unit] = []
    both: list[Unit] = []
    n_memory = n_bound = n_pools = 0
    best: dict[str, float] = {}
    for nodes, grid in grids(f, fleet):
        if not wanted(grid):
            continue
        if memory(f, grid, fleet.device).tokens < w.context:
            n_memory += 1
            continue
        for setup in setups(f, can_draft, loads):
            pool = Pool(f, grid, fleet.device, setup, engine)
            if pool.capacity(w.context) < 1:  # a layer that drafts takes memory too
                n_memory += 1
                continue
            n_pools += 1
            steps = Curve(step_of(pool, c, w.context), min(pool.capacity(w.context), MOST_BATCH))
            if nodes == 1 or "wide mixed" in families:
                unit = (
                    None if _hopeless(pool, nodes, w, slo, best, "mixed") else mixed_unit(pool, nodes, c, w, slo, steps)
                )
                n_bound += unit is None
                if unit:
                    both.append(unit)
                    best["mixed"] = max(best.get("mixed", 0.0), unit.users / nodes)
            if "cluster" in families and f.n_moe:
                if _hopeless(pool, nodes, w, slo, best, "decode"):
                    n_bound += 1
                elif (unit := decode_unit(pool, nodes, c, w, slo, steps)) is not None:
                    decode.append(unit)
                    best["decode"] = max(best.get("decode", 0.0), unit.users / nodes)
                if setup.draft == 0 and (unit := prefill_unit(pool, nodes, c, w, slo)) is not None:
                    prefill.append(unit)
    return Units(tuple(prefill), tuple(decode), tuple(both), n_pools, n_memory, n_bound)


def _hopeless(pool: Pool, nodes: float, w: Workload, slo: Slo, best: dict[str, float], role: str) -> bool:
    """True where even peak rates keep the promise for fewer users a node than a unit already found, by half."""
    have = best.get(role)
    if have is None:
        return False
    room = min(pool.capacity(w.context), MOST_BATCH)
    if room * pool.grid.dp / nodes < 0.5 * have:
        return True
    batch = 0.5 * have * nodes / pool.grid.dp
    step = decode_step(
        pool.f, pool.grid, pool.device, peak_rates(), batch, w.context, replace(pool.setup, overlap=False, perfect=True)
    )
    return max(step.computing, step.sending) / (1 + pool.setup.draft) > slo.tpot
