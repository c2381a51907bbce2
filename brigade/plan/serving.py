"""Users on units: how many are in flight, what each sees. Fixed points of the step times; analytic, no simulation.

mixed box     tpot = decode step / tokens a step + mixing x stagger x users / output x prefill of one prompt
              (while a request writes its `output` tokens, each other user of the replica brings one prompt)
disaggregated tpot = decode step / tokens a step; prompts queue for prefill replicas
in flight     N_decoding = X x output x tpot, X = min(N / (ttft + output x tpot), prefill capacity)  (Little's law)
queue         closed system: wait = max(M/D/m estimate, N / X_max - everything else)                (asymptotic bound)
tail          P(wait > t) = load x exp(-t x load / mean wait)
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import hypot, log, sqrt

from brigade.plan.memory import memory
from brigade.plan.rates import Calibration, Rates
from brigade.plan.step import Setup, Step, decode_step, prefill_step, tokens_per_step
from brigade.spec.device import Device
from brigade.spec.work import Facts, Grid

ROUNDS = 12
LENGTHS = 0.04
"""Standard deviation over mean of the time per token by different lengths and placement."""
P90, P99 = 1.28, 2.33
"""Standard deviations above the mean of a normal variable."""
DESIGN_LOAD = 0.7
"""Utilisation at which prefill units are planned, so that queues stay short; published production averages are taken
to run at it."""
CHUNK = 16384
"""Tokens that a replica prefills in one step at most."""


@dataclass(frozen=True)
class Workload:
    """What each of the users asks, again and again."""

    users: float
    """Requests in the system: being prefilled, decoded or waiting."""
    n_in: int
    n_out: int
    hit: float = 0.0
    """Share of input tokens whose keys and values are cached already."""

    @property
    def computed(self) -> float:
        return max(1.0, self.n_in * (1 - self.hit))

    @property
    def context(self) -> float:
        """Positions behind a request on average while it decodes."""
        return self.n_in + self.n_out / 2


@dataclass(frozen=True)
class Pool:
    """Equal units with one role."""

    f: Facts
    grid: Grid
    device: Device
    setup: Setup
    engine: str = ""
    n_units: int = 1

    @property
    def replicas(self) -> int:
        return self.n_units * self.grid.dp

    @property
    def in_step(self) -> bool:
        """Its replicas meet in every layer with experts, so they wait for each other."""
        return self.grid.dp > 1 and self.f.n_moe > 0

    def capacity(self, context: float) -> float:
        """Requests that the caches of one replica hold."""
        return memory(self.f, self.grid, self.device, drafts=self.setup.draft).tokens / context

    def factor(self, c: Calibration, phase: str) -> float:
        return c.factor(self.engine, self.device.name, phase)


@dataclass(frozen=True)
class Served:
    """What users see in a steady state."""

    tpot: float
    ttft: float
    wait: float
    """Of ttft: queueing."""
    load: float
    """Utilisation of what prefills."""
    running: float
    """Requests decoding on each replica."""
    in_flight: float
    """Requests decoding, all together."""
    rate: float
    """Requests per second."""
    limit: str
    """'users', 'kv memory' or 'prefill'."""
    decode: Step
    prefill: Step
    stalls: float = 0.0
    """Standard deviation over mean of a request's time per token by the prefills it meets: n of them on average take
    the share `load` of the time, so load / sqrt(n)."""
    gate: float = 0.0
    """Of ttft: where replicas step together, a prompt waits for the step that runs when it comes: evenly between
    nothing and twice this."""

    def tpot_quantile(self, z: float) -> float:
        """Time per token `z` standard deviations above its mean: lengths and stalls vary."""
        return self.tpot * (1 + z * hypot(LENGTHS, self.stalls))

    def ttft_quantile(self, p: float) -> float:
        """With P(wait > t) = load x exp(-t x load / mean wait), as in queues with random arrivals, behind the gate."""
        base = self.ttft - self.wait + (2 * p - 1) * self.gate
        if self.load <= 1 - p or not self.wait:
            return base
        return base + self.wait / self.load * log(self.load / (1 - p))


def steady(c: Calibration) -> Calibration:
    """For users who come and go, not a benchmark's who all start in the same second."""
    return replace(c, rates=replace(c.rates, burst=0.0))


def accept_of(setup: Setup, rates: Rates) -> float:
    return rates.accept if setup.accept is None else setup.accept


def prefill_time(pool: Pool, c: Calibration, w: Workload) -> tuple[float, Step]:
    """Seconds in which a replica computes one prompt, alone; long ones in chunks, which pipeline stages share."""
    chunks = max(1, -(-int(w.computed) // CHUNK))
    before = w.n_in - w.computed
    step = prefill_step(pool.f, pool.grid, pool.device, c.rates, w.computed / chunks, w.computed, before, pool.setup)
    stages = pool.grid.pp
    return step.seconds * (chunks + stages - 1) / stages * pool.factor(c, "prefill"), step


def gathering(pool: Pool, c: Calibration) -> float:
    """How much later the first token comes where replicas step together."""
    return c.rates.gather if pool.in_step else 1.0


def gated(base: float, pool: Pool, c: Calibration) -> float:
    """Of a time to first token without its queue, the wait for the step that runs."""
    return base * (1 - 1 / max(1.0, gathering(pool, c)))


def occupied(pool: Pool, alone: float, w: Workload) -> float:
    """Of `alone` (one prompt's time), what each pipeline stage is busy with it; then the next prompt may follow."""
    chunks = max(1, -(-int(w.computed) // CHUNK))
    return alone * chunks / (chunks + pool.grid.pp - 1)


StepOf = Callable[[float], Step]
"""A decode step by the requests of a replica."""


def step_of(pool: Pool, c: Calibration, context: float) -> StepOf:
    return lambda batch: decode_step(pool.f, pool.grid, pool.device, c.rates, batch, context, pool.setup)


def mixed(
    pool: Pool,
    c: Calibration,
    w: Workload,
    at_least: float = 0.0,
    steps: StepOf | None = None,
    alone: tuple[float, Step] | None = None,
) -> Served:
    """Every unit prefills and decodes. `at_least`: requests that a replica is known to hold, whatever its memory.

    `steps`, `alone`: decode steps and the prefill of one prompt, where the caller has them already.
    """
    r = c.rates
    steps = steps or step_of(pool, c, w.context)
    each = w.users / pool.replicas
    room = max(1e-3, at_least, pool.capacity(w.context))
    pre, pre_step = alone or prefill_time(pool, c, w)
    busy = occupied(pool, pre, w)
    per = tokens_per_step(pool.setup.draft, accept_of(pool.setup, r))
    stagger = r.stagger if pool.in_step else 1.0
    running = min(each, room)
    factor = pool.factor(c, "decode")
    late = c.ttft_factor(pool.engine, pool.device.name, apart=False) * gathering(pool, c)
    tpot, ttft, wait, load = 0.0, 0.0, 0.0, 0.0
    for i in range(ROUNDS):
        step = steps(running)
        stalls = r.mixing * stagger * running / w.n_out * busy
        tpot = step.seconds * factor / per + stalls
        base = r.ttft_ms * 1e-3 + r.alone * pre * stagger + step.seconds * factor / 2
        load = min(0.98, stalls / tpot) if tpot else 0.0
        wait = r.waiting * load / (2 * (1 - load)) * busy + r.burst * running * busy * stagger
        if each > room:  # the rest waits for a place in the cache
            wait += (each - room) / room * w.n_out * tpot / late
        wait *= late
        ttft = base * late + wait
        share = w.n_out * tpot / (w.n_out * tpot + ttft)
        new = min(room, each * share)
        running = max(1e-6, new if i == 0 else (running + new) / 2)
    limit = "kv memory" if each > room else "users"
    rate = pool.replicas * running / (w.n_out * tpot)
    stalls = load / sqrt(max(1.0, running))
    gate = gated(ttft - wait, pool, c)
    return Served(tpot, ttft, wait, load, running, running * pool.replicas, rate, limit, step, pre_step, stalls, gate)


def disaggregated(
    prefill: Pool, decode: Pool, c: Calibration, w: Workload, cap: float = 0.0, busy: float | None = None
) -> Served:
    """Prefill units hand their caches to decode units. `cap`: requests a decode replica holds; 0: by its memory.
    `busy`: seconds of a prefill replica for each prompt under load; None: what one takes alone."""
    r = c.rates
    pre, pre_step = prefill_time(prefill, c, w)
    busy = occupied(prefill, pre, w) if busy is None else busy
    servers = float(prefill.replicas)
    full = servers / busy  # prompts per second
    room = max(1e-3, cap or decode.capacity(w.context))
    per = tokens_per_step(decode.setup.draft, accept_of(decode.setup, r))
    link = min(prefill.device.nic, decode.device.nic) * r.out
    send = r.transfer * w.n_in * decode.f.kv_bytes / link / prefill.grid.tp
    late = c.ttft_factor(prefill.engine, prefill.device.name, apart=True) * gathering(prefill, c)
    base = (r.ttft_ms * 1e-3 + r.alone_apart * pre + send) * late
    factor = decode.factor(c, "decode")
    running = min(w.users / decode.replicas, room)
    ttft = base
    for i in range(ROUNDS):
        step = decode_step(decode.f, decode.grid, decode.device, r, running, w.context, decode.setup)
        tpot = step.seconds * factor / per
        stay = w.n_out * tpot
        rate = min(w.users / (ttft + stay), full, room * decode.replicas / stay)
        load = min(0.98, rate / full)
        queue = r.waiting * busy / servers * load / (2 * (1 - load)) + r.burst * w.users * busy / servers
        excess = w.users / min(full, room * decode.replicas / stay) - stay - base
        wait = max(queue, excess)
        ttft = base + wait
        new = min(room, rate * stay / decode.replicas)
        running = max(1e-6, new if i == 0 else (running + new) / 2)
    limit = "prefill" if w.users / (base + stay) > full else "kv memory" if running >= room * 0.999 else "users"
    gate = gated(base, prefill, c)
    return Served(
        tpot, ttft, wait, load, running, running * decode.replicas, rate, limit, step, pre_step, gate=gate
    )  # fmt: skip


class Curve:
    """Decode steps of a replica between samples up to `high` (more than 0): exact at the samples, linear between, which
    steps nearly are. Where they are not, an operating point is found by adding samples at it."""

    def __init__(self, steps: StepOf, high: float) -> None:
        self.at = [high * x for x in (1 / 512, 1 / 128, 1 / 32, 1 / 12, 1 / 5, 0.45, 1.0)]
        self.steps = [steps(b) for b in self.at]
        self.exact = steps

    def __call__(self, batch: float) -> Step:
        i = min(bisect_right(self.at, batch), len(self.at) - 1)
        j = max(0, i - 1)
        step = self.steps[i]
        if i == j:
            return step
        share = (batch - self.at[j]) / (self.at[i] - self.at[j])
        low = self.steps[j].seconds
        return step._replace(seconds=low + max(0.0, share) * (step.seconds - low))

    def is_exact_at(self, batch: float, within: float = 1e-3) -> bool:
        """Whether the curve was right at a batch, as a share of the step; it is from now on."""
        step = self.exact(batch)
        before = self(batch).seconds
        i = bisect_right(self.at, batch)
        if batch not in self.at:
            self.at.insert(i, batch)
            self.steps.insert(i, step)
        return abs(before / step.seconds - 1) <= within


def largest(ok: Callable[[float], bool], high: float) -> float:
    """The largest number up to `high` that is `ok` (numbers below an ok one are ok); 0 where none is."""
    if ok(high):
        return high
    low = 0.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if ok(middle) else (low, middle)
        if high - low < 1e-3 * high:
            break
    return low
