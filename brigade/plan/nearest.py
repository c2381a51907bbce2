"""Why nothing serves even one user, and the nearest that would. Messages for one line of a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, floor, log10

from brigade.plan.memory import memory, weight_bytes
from brigade.plan.quantity import Servers
from brigade.plan.question import Question
from brigade.plan.rates import Calibration
from brigade.plan.search import search
from brigade.plan.serving import DESIGN_LOAD, P90, Pool, Workload, accept_of, mixed, prefill_time, steady
from brigade.plan.step import decode_step, tokens_per_step
from brigade.plan.units import TAIL, Slo, computes, first_token, floor_tpot, floor_ttft, grids, setups
from brigade.spec.work import Facts

MOST_NODES = 64
SLACK = (1.01, 1.03, 1.1, 1.3, 2.0)
"""Times a promise that one user was found to be given, until the search finds that user too."""


@dataclass(frozen=True)
class Alone:
    """What one user is promised at best by a unit of some nodes, in seconds at p90."""

    fleet: Servers
    nodes: float
    tpot: float
    ttft: float


def why_nothing(q: Question, f: Facts, c: Calibration, w: Workload) -> str:
    """Which limit is met first, and the nearest that is possible."""
    tokens = [memory(f, g, fleet.device).tokens for fleet in q.fleets for _, g in grids(f, fleet)]
    have = " + ".join(f"{s.n} x {s.per_node} x {s.device.name}" for s in q.fleets)
    fleet = q.fleets[0]
    if max(tokens, default=0) < 1:
        total = sum(s.n_gpus * s.device.hbm for s in q.fleets) / 1e9
        return (
            f"{q.model.name} in {q.precision_name} needs {weight_bytes(f) / 1e9:,.0f} GB for weights alone and {have} "
            f"have {total:,.0f} GB, not all usable; the nearest that fits is {_more_servers(f, fleet, w.context)}"
        )
    if max(tokens) < w.context:
        shorter = floor(max(tokens) - w.n_out / 2)
        nearest = f"--input {shorter}, or " if shorter >= 1 else ""
        return (
            f"{have} hold {q.model.name} with {max(tokens):,} tokens of cache at most, and one request needs "
            f"{w.context:,.0f}; the nearest is {nearest}{_more_servers(f, fleet, w.context)}"
        )
    reason = "no layout keeps the promise for even one user"
    if (least := min(floor_tpot(f, s, w, q.can_draft) for s in q.fleets)) > q.slo.tpot:
        reason = _below(f"--tpot {_time(q.slo.tpot)}", f"reading weights alone takes {_time(_up(least))} a token")
    elif (least := min(floor_ttft(f, s, w, c) for s in q.fleets)) > q.slo.ttft:
        reason = _below(f"--ttft {_time(q.slo.ttft)}", f"the products of a prompt alone take {_time(_up(least))}")
    return f"{reason}; {nearest_promise(q, f, c, w)}"


def _below(option: str, takes: str) -> str:
    return f"{option} is below the physical floor of these servers: {takes}"


def _more_servers(f: Facts, fleet: Servers, context: float) -> str:
    nodes = fit_nodes(f, fleet, context)
    return f"{nodes} x {fleet.per_node} x {fleet.device.name}" if nodes else "a smaller model or precision"


def nearest_promise(q: Question, f: Facts, c: Calibration, w: Workload) -> str:
    """The least loosening of one promise, or of both where one alone is not enough, that some layout keeps."""
    found = list(alone(q, f, steady(c), replace(w, users=1.0)))

    def loosened(a: Alone) -> tuple[bool, float]:
        """Both promises last; the fewest times of the one that has to give most."""
        tpot, ttft = a.tpot / q.slo.tpot, a.ttft / q.slo.ttft
        return min(tpot, ttft) > 1, max(tpot, ttft)

    for a in sorted(found, key=loosened)[:3]:
        for slack in SLACK:
            tpot = q.slo.tpot if a.tpot <= q.slo.tpot else _up(a.tpot * slack)
            ttft = q.slo.ttft if a.ttft <= q.slo.ttft else _up(a.ttft * slack)
            fleet = replace(a.fleet, n=ceil(a.nodes))
            if search(f, fleet, q.engine, c, w, Slo(tpot, ttft), q.can_draft, q.loads).layouts:
                said = [f"--tpot {_time(tpot)}"] if tpot > q.slo.tpot else []
                said += [f"--ttft {_time(ttft)}"] if ttft > q.slo.ttft else []
                return f"the nearest that some layout keeps is {' '.join(said)}"
    return "no layout of these servers keeps any promise to a request of this length; ask for more servers"


def alone(q: Question, f: Facts, c: Calibration, w: Workload) -> Iterator[Alone]:
    """What one user gets from mixed units, and from the fastest prefill and decode units that fit beside each other."""
    for fleet in q.fleets:
        prefill: dict[float, float] = {}
        decode: dict[float, float] = {}
        for nodes, grid in grids(f, fleet):
            for setup in setups(f, q.can_draft, q.loads):
                pool = Pool(f, grid, fleet.device, setup, q.engine)
                if pool.capacity(w.context) < 1:
                    continue
                one = mixed(pool, c, w, alone=prefill_time(pool, c, w))
                if one.load <= DESIGN_LOAD:
                    yield Alone(fleet, nodes, one.tpot_quantile(P90), one.ttft_quantile(0.9))
                if not f.n_moe:
                    continue
                step = decode_step(f, grid, fleet.device, c.rates, 1 / grid.dp, w.context, setup)
                each = tokens_per_step(setup.draft, accept_of(setup, c.rates)) / (pool.factor(c, "decode") * TAIL)
                decode[nodes] = min(decode.get(nodes, float("inf")), step.seconds / each)
                if not setup.draft and computes(pool, w):
                    prefill[nodes] = min(prefill.get(nodes, float("inf")), first_token(pool, c, w)[1])
        for p, ttft in prefill.items():
            for d, tpot in decode.items():
                if p + d <= fleet.n:
                    yield Alone(fleet, p + d, tpot, ttft)


def _up(value: float) -> float:
    """Rounded up to three digits."""
    unit = 10.0 ** (floor(log10(value)) - 2)
    return ceil(value / unit) * unit


def _time(seconds: float) -> str:
    """As --tpot and --ttft read it."""
    return f"{seconds:.6g}s" if seconds >= 1 else f"{seconds * 1e3:.6g}ms"


def fit_nodes(f: Facts, fleet: Servers, context: float) -> int:
    """Fewest nodes of this kind that hold the model and a request of `context` tokens; 0 where MOST_NODES do not."""
    for n in range(1, MOST_NODES + 1):
        if any(memory(f, g, fleet.device).tokens >= context for _, g in grids(f, replace(fleet, n=n))):
            return n
    return 0
