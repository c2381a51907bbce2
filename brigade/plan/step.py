"""Seconds of one step of one unit: the ops of spec/work.py over the device's peaks times the calibrated rates.

computing   max(FLOPs / (peak x share x (BF16 peak / reference)^-falloff), bytes / (memory x share))
sending     wire bytes / (link x share) + calls x latency; what goes over both links at once takes the longer
            core attention, whose products and reads take about as long: the root of the sum of their squares
imbalance   multiplies experts, dispatch and combine: the step waits for the busiest rank (balance.py)
serial      computing + sending + host
overlap     two micro-batches: max(computing, sending) + hidden x min(...) + host, each reading the weights again
pipeline    a pass goes through all stages: the step of one stage's accelerators with all layers, and the hops between.
            Decoding requests go round in `pp` groups, so a group has requests / pp
step        times the factor of engine x hardware x phase
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import NamedTuple

from brigade.plan.balance import LoadStatistics, counted, imbalance, left_after_placing
from brigade.plan.rates import Rates
from brigade.spec.device import Device
from brigade.spec.work import Facts, Grid, Op, decode_ops, prefill_ops

LENT = 20 / 132
"""Share of the processors that normal dispatch kernels hold while they run beside computing (DeepSeek-V3, 3.2.2)."""
REFERENCE = 989e12
"""BF16 peak of the device whose shares `Rates` are. It stands for a device's size: not all have an FP8 unit."""
SMALLEST = 147e12
"""BF16 peak of the smallest device whose own products were fitted (RTX 4090D). Below it, shares that go on growing
would pass 1, so they end there."""
EVEN = LoadStatistics(spread=0.0, drift=0.0)
SAMPLED = LoadStatistics()


@dataclass(frozen=True)
class Setup:
    """How a unit runs, beyond its grid."""

    overlap: bool = False
    """Two-batch overlap."""
    draft: int = 0
    """Tokens drafted by multi-token prediction each step."""
    balanced: bool = True
    """Experts are placed by their loads (EPLB)."""
    perfect: bool = False
    """Loads are exactly even, sampling included: what balanced benchmarks simulate."""
    loads: LoadStatistics = SAMPLED
    experts_on: Device | None = None
    """Where the routed experts are kept and computed, if not on the accelerator: a CPU host."""
    accept: float | None = None
    """Chance that a drafted token is accepted; None: the calibrated one."""


PLAIN = Setup()


class Drafting(NamedTuple):
    """What multi-token prediction adds to a step."""

    passes: int
    layers: float
    """Of all passes, as a share of the model's."""


NO_DRAFT = Drafting(0, 0.0)


class Term(NamedTuple):
    """One op's time in a step."""

    name: str
    seconds: float
    bound: str
    """What limits it: compute, memory, scale-up, scale-out, latency, host."""
    op: Op


class Step(NamedTuple):
    """A step's time and what it is made of."""

    seconds: float
    computing: float
    sending: float
    host: float
    overlapped: bool
    phi: float
    """Busiest rank over mean."""
    terms: tuple[Term, ...]


def tokens_per_step(draft: int, accept: float) -> float:
    """Expected tokens of a step that verifies `draft` drafted ones: 1 + a + a^2 + ... (each needs those before it)."""
    return sum(accept**i for i in range(draft + 1))


def decode_step(
    f: Facts, grid: Grid, device: Device, rates: Rates, requests: float, context: float, setup: Setup = PLAIN
) -> Step:
    """One decode step: `requests` on each attention replica, `context` positions behind each. With overlap allowed, the
    faster of both ways: below a crossover, reading the weights twice costs more than is hidden.

    Each drafted token costs a pass of 1.5 layers (one, and the projection that joins its two inputs), the head and a
    launch.
    """
    per = 1 + setup.draft
    if grid.pp > 1:
        group = max(requests / grid.pp, min(requests, 1.0))
        one = decode_step(f, stage_of(grid), device, rates, group, context, setup)
        return _piped(one, grid, group * per, f, device, rates)
    phi = _phi(f, grid, requests * per, requests, rates, setup)
    ops = decode_ops(f, grid, requests, context, per)
    draft = Drafting(setup.draft, 1.5 * setup.draft / f.n_layers)
    if not setup.overlap:
        return _serial(
            ops, grid, device, rates, phi, draft, rates.layer_us * 1e-6 * f.n_layers, False, setup.experts_on
        )
    serial = decode_step(f, grid, device, rates, requests, context, replace(setup, overlap=False))
    half = decode_ops(f, grid, requests / 2, context, per)
    one = _serial(half, grid, device, rates, phi, draft, rates.layer_us * 1e-6 * f.n_layers / 2, False)
    return min(serial, _overlapped(one, rates), key=lambda s: s.seconds)


def prefill_step(
    f: Facts,
    grid: Grid,
    device: Device,
    rates: Rates,
    tokens: float,
    length: float,
    before: float = 0.0,
    setup: Setup = PLAIN,
) -> Step:
    """One prefill step: `tokens` computed on each attention replica, in prompts of `length` after `before` cached."""
    if grid.pp > 1:
        one = prefill_step(f, stage_of(grid), device, rates, tokens, length, before, setup)
        return _piped(one, grid, tokens, f, device, rates)
    phi = _phi(f, grid, tokens, tokens / length, rates, setup)
    launch = rates.chunk_us * 1e-6 * f.n_layers
    if not setup.overlap:
        ops = prefill_ops(f, grid, tokens, length, before)
        return _serial(ops, grid, device, rates, phi, NO_DRAFT, launch, True, setup.experts_on)
    half = prefill_ops(f, grid, tokens / 2, length, before)
    lent = replace(device, bf16=device.bf16 * (1 - LENT), fp8=device.fp8 * (1 - LENT), fp4=device.fp4 * (1 - LENT),
                   int8=device.int8 * (1 - LENT))  # fmt: skip
    return _overlapped(_serial(half, grid, lent, rates, phi, NO_DRAFT, launch / 2, True), rates)


def stage_of(grid: Grid) -> Grid:
    """One pipeline stage's accelerators, as if they had all layers."""
    return replace(grid, n_gpus=grid.stage, pp=1)


def _piped(one: Step, grid: Grid, tokens: float, f: Facts, device: Device, rates: Rates) -> Step:
    """A pass through all stages: `one` and the activations' hops from stage to stage over NICs."""
    n = grid.pp - 1
    wire = n * tokens * f.dim * 2 / grid.tp
    seconds = wire / (device.nic * rates.out) + n * rates.exchange_us * 1e-6
    hop = Term("stages", seconds, "scale-out", Op("stages", 0, 0, wire, "scale-out", "bf16", n))
    return one._replace(seconds=one.seconds + seconds, sending=one.sending + seconds, terms=(*one.terms, hop))


def _phi(f: Facts, grid: Grid, tokens: float, requests: float, rates: Rates, setup: Setup) -> float:
    if setup.perfect or not f.n_moe:
        return 1.0
    n_slots = f.n_experts + grid.redundant
    if setup.loads.counts and len(setup.loads.counts[0]) == f.n_experts:
        phi = counted(setup.loads.counts, grid.routed, 1, n_slots, setup.balanced)
        return phi + imbalance(grid.routed, 1.0, tokens * grid.dp * f.top_k / grid.routed, EVEN, 0.0, True) - 1
    left = left_after_placing(rates.drift, rates.taste, requests * grid.dp)
    rows = tokens * grid.dp * f.top_k / grid.routed
    return imbalance(grid.routed, n_slots / grid.routed, rows, setup.loads, left, setup.balanced, grid.redundant > 0)


def _serial(
    ops: Sequence[Op],
    grid: Grid,
    device: Device,
    rates: Rates,
    phi: float,
    draft: Drafting,
    launch: float,
    prefill: bool,
    experts_on: Device | None = None,
) -> Step:
    computing, sending = 0.0, {"dispatch": 0.0, "combine": 0.0}
    terms = []
    core = rates.core_prefill if prefill else rates.core_decode
    gemm = rates.gemm if prefill else rates.gemm_decode
    gemm4 = rates.gemm4 * gemm / rates.gemm
    for op in ops:
        if op.name == "host":
            continue
        if op.link:
            term = _send(op, device, rates, phi, grid)
            sending[op.name] = max(sending[op.name], term.seconds)
            terms.append(term)
            continue
        share = core if op.name == "core attention" else gemm4 if op.precision in ("fp4", "int4") else gemm
        on = experts_on if experts_on is not None and op.name == "experts" else device
        if on.kind == "cpu":
            memory = on.hbm_rate * rates.host_memory
        else:
            memory = on.hbm_rate * (rates.memory if op.balanced else rates.stream)
        reached = share * (on.bf16 / REFERENCE) ** -rates.falloff
        if on is device and on.bf16 < SMALLEST:
            reached = min(1.0, reached)
        products = op.flops / (on.rate(op.precision) * reached)
        if not op.balanced:
            products *= 1 + rates.tile / op.rows
        if op.name == "small kernels":
            reads = op.n_bytes * rates.passes / memory
            seconds, bound = reads + launch, "latency" if launch > reads else "memory"
        else:
            reads = op.n_bytes / memory
            seconds, bound = (products, "compute") if products > reads else (reads, "memory")
            if op.name == "core attention":  # near the ridge a kernel hides neither behind the other
                seconds = hypot(products, reads)
        if not op.balanced:
            seconds = max(products * phi, reads)
        seconds *= 1 + (draft.passes if op.name == "head" else draft.layers)
        computing += seconds
        terms.append(Term(op.name, seconds, bound, op))
    host = (rates.host_ms + draft.passes * rates.draft_ms) * 1e-3
    terms.append(Term("host", host, "host", Op("host", calls=1)))
    total = sum(sending.values()) * (1 + draft.layers)
    return Step(computing + total + host, computing, total, host, False, phi, tuple(terms))


def _send(op: Op, device: Device, rates: Rates, phi: float, grid: Grid) -> Term:
    """Ops of one name run at once, on different links; each carries the latency of its calls."""
    exchanged = grid.dp > 1 and not op.balanced
    near = rates.fan if exchanged else rates.up
    wire = op.wire / (device.scale_up * near if op.link == "scale-up" else device.nic * rates.out)
    latency = op.calls * (_exchange_us(grid, rates) if exchanged else rates.reduce_us) * 1e-6
    wire *= 1 + (phi - 1) * min(1.0, rates.felt) if exchanged else 1.0
    return Term(op.name, wire + latency, op.link if wire > latency else "latency", op)


def _exchange_us(grid: Grid, rates: Rates) -> float:
    return rates.near_us if grid.stage <= grid.per_node else rates.exchange_us


def _overlapped(half: Step, rates: Rates) -> Step:
    """Two micro-batches, each like `half`, that compute and send in turn."""
    computing, sending = 2 * half.computing, 2 * half.sending
    seconds = max(computing, sending) + rates.hidden * min(computing, sending) + half.host
    terms = tuple(Term(t.name, 2 * t.seconds, t.bound, t.op) if t.name != "host" else t for t in half.terms)
    return Step(seconds, computing, sending, half.host, True, half.phi, terms)
