"""A question in plain values, and its answer: options side by side, one recommended, each with its reason.

Nothing is guessed in silence: whatever the question left open is in `assumptions`.
"""

from dataclasses import dataclass, field, replace
from math import ceil, exp, sqrt

from brigade.plan.memory import memory, weight_bytes
from brigade.plan.models import Model, find_model
from brigade.plan.quantity import Servers
from brigade.plan.rates import Calibration
from brigade.plan.search import (
    Found,
    Layout,
    Slo,
    cheapest,
    floor_tpot,
    grids,
    search,
    strongest,
)
from brigade.plan.serving import DESIGN_LOAD, P90, P99, Served, Workload, disaggregated, mixed, steady
from brigade.plan.step import Setup
from brigade.spec.device import Device
from brigade.spec.work import FP8, Facts, Precision

BESIDE_CARDS = 0.35
"""Power of a server beyond its accelerators (hosts, NICs, switches, cooling), as a share of theirs."""
WEAK = 0.2
"""Widening of an interval's logarithm by a device whose peak rates rest on a weak source."""
SMALLER = ("r1-distill-llama-70b", "r1-distill-qwen-32b")
"""Dense models of the same family, offered beside."""
FAMILIES = ("boxes", "wide mixed", "cluster")
NAMES = {
    "boxes": "all-in-one boxes",
    "wide mixed": "one expert-parallel unit over nodes, prefill and decode mixed",
    "cluster": "expert-parallel cluster, prefill and decode apart",
}


class Impossible(ValueError):
    """A request that cannot be met. The message says why, and the nearest that can."""


@dataclass(frozen=True)
class Question:
    """What is asked; see `brigade plan --help`."""

    model: Model
    fleets: tuple[Servers, ...]
    users: int
    n_in: int
    n_out: int
    hit: float
    slo: Slo
    precision: Precision
    precision_name: str
    engine: str = ""
    price: float | None = None
    api_price: float | None = None
    loads: Setup = field(default_factory=Setup)
    draft: bool = True
    night: float | None = None
    smaller: bool = True
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One deployment, at the users that were asked for or as many as it keeps the promise for."""

    name: str
    family: str
    model: str
    layout: Layout
    device: Device
    fits: bool
    """It serves all users within the promise."""
    users: float
    """At which everything below is."""
    most_users: float
    most_users_range: tuple[float, float]
    """80 % interval."""
    served: Served
    tokens_per_gpu: float
    """Output tokens/s, as all other rates here."""
    tokens_per_node: float
    tokens_range: tuple[float, float]
    """80 % interval of tokens_per_gpu at full use."""
    ttft: tuple[float, float, float]
    """p50, p90, p99 in seconds."""
    tpot: tuple[float, float, float]
    cost: float | None
    """Dollars per million output tokens, all cost on output."""
    kilowatts: float
    limit: str
    why: str

    @property
    def n_gpus(self) -> int:
        return sum(u.grid.n_gpus * k for u, k in self.layout.units)


@dataclass(frozen=True)
class Answer:
    """Options, the recommended one first."""

    question: Question
    options: tuple[Option, ...]
    recommended: Option | None
    sentence: str
    crossover: str
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    found: tuple[tuple[Servers, Found], ...]
    about: str
    curve: tuple[tuple[int, dict[str, float]], ...]
    """Nodes that each family needs, by users."""


def answer(q: Question, c: Calibration) -> Answer:
    """Searches every fleet. Raises Impossible where nothing serves even one user."""
    w = Workload(q.users, q.n_in, q.n_out, q.hit)
    f = q.model.facts(q.precision)
    can_draft = q.draft and q.model.spec.n_mtp > 0
    found = tuple((fleet, search(f, fleet, q.engine, c, w, q.slo, can_draft, q.loads)) for fleet in q.fleets)
    options = [o for fleet, one in found for o in _options(q, f, fleet, one, c, w)]
    if not options:
        raise Impossible(_why_nothing(q, f, c, w, can_draft))
    fitting = [o for o in options if o.fits]
    best = min(fitting, key=_money) if fitting else None
    main = list(options)
    if q.smaller:
        options += _smaller(q, c, w)
    options.sort(key=lambda o: (o is not best, not o.fits, _money(o)))
    one = found[0][1]
    return Answer(
        q,
        tuple(options),
        best,
        _sentence(q, best, main),
        _crossover(one),
        tuple(_notes(q, best or main[0], c)),
        _assumptions(q, c),
        found,
        c.about,
        crossover_curve(one),
    )


def _money(o: Option) -> float:
    """What makes one option better than another: dollars an hour where prices are known, else accelerators."""
    return o.n_gpus * (o.device.price or 1.0)


def _options(q: Question, f: Facts, fleet: Servers, found: Found, c: Calibration, w: Workload) -> list[Option]:
    out = []
    for family in FAMILIES:
        layout = cheapest(found, q.users, family) or strongest(found, family)
        if layout is not None:
            out.append(option(q, q.model.name, layout, fleet, c, w))
    return out


def option(q: Question, model: str, layout: Layout, fleet: Servers, c: Calibration, w: Workload) -> Option:
    """A layout at the users asked for."""
    users = min(float(q.users), layout.users)
    at = replace(w, users=users)
    served = serve(layout, c, at)
    n_gpus = sum(u.grid.n_gpus * k for u, k in layout.units)
    tokens = served.rate * w.n_out
    half = interval(layout, c)
    full = layout.rate * w.n_out / n_gpus
    device = replace(fleet.device, price=q.price) if q.price is not None else fleet.device
    cost = None if device.price is None else n_gpus * device.price / (tokens * 3600 / 1e6)
    ttft = tuple(served.ttft_quantile(p) for p in (0.5, 0.9, 0.99))
    limit = next((u.limit for u, _ in reversed(layout.units)), "")
    return Option(
        name=describe(layout),
        family=layout.family,
        model=model,
        layout=layout,
        device=device,
        fits=layout.users >= q.users,
        users=users,
        most_users=layout.users,
        most_users_range=(layout.users * exp(-half), layout.users * exp(half)),
        served=served,
        tokens_per_gpu=tokens / n_gpus,
        tokens_per_node=tokens / layout.nodes,
        tokens_range=(full * exp(-half), full * exp(half)),
        ttft=(ttft[0], ttft[1], ttft[2]),
        tpot=(served.tpot, served.tpot_quantile(P90), served.tpot_quantile(P99)),
        cost=cost,
        kilowatts=n_gpus * device.watts * (1 + BESIDE_CARDS) / 1e3,
        limit=limit,
        why=_why(layout, limit, w),
    )


def serve(layout: Layout, c: Calibration, w: Workload) -> Served:
    """What the users of a layout see."""
    pools = [(u.role, replace(u.pool, n_units=k)) for u, k in layout.units]
    if len(pools) == 1:
        return mixed(pools[0][1], steady(c), w)
    prefill = next(p for role, p in pools if role == "prefill")
    decode = next(p for role, p in pools if role == "decode")
    return disaggregated(prefill, decode, steady(c), w)


def interval(layout: Layout, c: Calibration) -> float:
    """Half width of the 80 % interval of the layout's throughput, as a logarithm."""
    out = 0.0
    for u, _ in layout.units:
        for phase in ("prefill", "decode") if u.role == "mixed" else (u.role,):
            half = c.half_width(u.pool.engine, u.pool.device.name, phase)
            out = max(out, sqrt(half**2 + (WEAK**2 if u.pool.device.is_weak else 0)))
    return out


def describe(layout: Layout) -> str:
    """ "1 x prefill EP32 (4 nodes) + 1 x decode EP144 (18 nodes, 32 spare slots, drafting 1)"."""
    parts = []
    for u, k in layout.units:
        g = u.grid
        ways = [f"EP{g.ep}"] if g.ep > 1 else []
        ways += [f"TP{g.tp}"] if g.tp > 1 else []
        ways += [f"DP{g.dp}"] if g.dp > 1 and g.ep == 1 else []
        inner = [f"{u.nodes:g} node{'s' if u.nodes != 1 else ''}"]
        inner += [f"{g.redundant} spare slots"] if g.redundant else []
        inner += [f"drafting {u.pool.setup.draft}"] if u.pool.setup.draft else []
        parts.append(f"{k} x {u.role} {' '.join(ways) or 'replica'} ({', '.join(inner)})")
    return " + ".join(parts)


LIMITS = {
    "kv memory": "the cache fills its memory",
    "tpot": "the time per token reaches the promise",
    "ttft": "prompts would wait longer than the promise",
    "prefill load": "prefills take all the time that decoding leaves",
    "batch": "no engine runs larger batches",
}


def _why(layout: Layout, limit: str, w: Workload) -> str:
    unit = layout.units[-1][0]
    pool, g = unit.pool, unit.grid
    gigabytes = memory(pool.f, g, pool.device, drafts=pool.setup.draft).weights / 1e9
    held = f"each card holds {gigabytes:.0f} GB of weights and {unit.users / max(g.dp, 1):.0f} requests of a replica"
    if not pool.f.n_moe:
        return f"dense, {held}; {LIMITS.get(limit, limit)}"
    rows = unit.users / g.dp * g.dp * pool.f.top_k / max(pool.f.n_experts + g.redundant, 1)
    return f"{held}, an expert gets {rows:.0f} rows a step; {LIMITS.get(limit, limit)}"


def _sentence(q: Question, best: Option | None, options: list[Option]) -> str:
    if best is None:
        most = max(options, key=lambda o: o.most_users)
        more = ceil(most.layout.nodes * q.users / most.most_users)
        return (
            f"These servers cannot keep the promise for {q.users:,} users; the nearest is {most.most_users:,.0f} users "
            f"on {most.name}, and about {more} nodes would serve all."
        )
    head = f"Run {best.name}: {best.layout.nodes:g} of {sum(s.n for s in q.fleets)} nodes serve {q.users:,} users"
    others = [o for o in options if o.family != best.family]
    if not others:
        return f"{head}; a single box cannot hold the model with a request beside it."
    if best.family == "boxes" and all(o.layout.nodes >= best.layout.nodes for o in others):
        least = min(o.layout.nodes for o in others)
        return f"{head}. Do not build a cluster: it would take {least:g} nodes for the same."
    return f"{head}; " + "; ".join(f"{NAMES[o.family]}: {_instead(o)}" for o in others) + "."


def _instead(o: Option) -> str:
    if o.fits:
        return f"{o.layout.nodes:g} nodes"
    return f"{o.most_users:,.0f} users at most, because {LIMITS.get(o.limit, o.limit)}"


def crossover_curve(found: Found) -> tuple[tuple[int, dict[str, float]], ...]:
    """Nodes needed by each family at every number of users where one of them changes."""
    marks = sorted({int(x.users) for x in found.layouts if x.users >= 1})
    out = []
    for users in marks:
        row: dict[str, float] = {}
        for family in FAMILIES:
            if (layout := cheapest(found, users, family)) is not None:
                row[family] = layout.nodes
        out.append((users, row))
    return tuple(out)


def _crossover(found: Found) -> str:
    curve = crossover_curve(found)
    if not any("boxes" in row for _, row in curve):
        return "a single box cannot hold the model and its requests, so every size needs expert parallelism over nodes"
    if not any("cluster" in row for _, row in curve):
        return "no cluster of these servers keeps the promise"
    wins = [(users, row) for users, row in curve if row.get("cluster", 1e9) < row.get("boxes", 1e9)]
    if not wins:
        return "boxes need no more nodes than a cluster at any number of users that these servers reach"
    first = min(users for users, _ in wins)
    below = max((users for users, row in curve if users < first), default=0)
    return f"below {below:,} concurrent users boxes need no more nodes; above, the cluster needs fewer"


def _notes(q: Question, best: Option, c: Calibration) -> list[str]:
    notes = []
    if q.api_price is not None and best.cost is not None:
        use = best.cost / q.api_price
        notes.append(
            f"break-even: at ${q.api_price:g} per million output tokens the servers pay for themselves at "
            f"{100 * use:.0f} % of this load" + (" (never, then)" if use > 1 else "")
        )
    if q.night is not None:
        asleep = max(1, ceil(best.layout.nodes * q.night))
        notes.append(
            f"at night, with {q.night:.0%} of the users, about {asleep} of {best.layout.nodes:g} nodes suffice"
        )
    notes.append(narrowing(best, c))
    if best.device.weak:
        notes.append(f"weak sources for {best.device.name}: {', '.join(sorted(best.device.weak))}")
    return notes


def narrowing(best: Option, c: Calibration) -> str:
    """Which measurement would narrow the interval most."""
    widest, phase = 0.0, "decode"
    for u, _ in best.layout.units:
        for one in ("prefill", "decode") if u.role == "mixed" else (u.role,):
            half = c.half_width(u.pool.engine, u.pool.device.name, one)
            if half > widest:
                widest, phase = half, one
    if c.knows(best.layout.units[0][0].pool.engine, best.device.name, phase) == "engine+hardware":
        return f"the interval is widest in {phase}; measure it on your own load and give it to --calibrate"
    then = c.spread.get(f"{phase}/engine+hardware", 0.2)
    return (
        f"measuring {phase} once with your engine on {best.device.name} (--calibrate) would narrow the interval most: "
        f"from +-{100 * (exp(widest) - 1):.0f} % to +-{100 * (exp(then) - 1):.0f} %"
    )


def _smaller(q: Question, c: Calibration, w: Workload) -> list[Option]:
    """Dense models on the same servers, for those who can do with one."""
    out = []
    for name in SMALLER:
        model = find_model(name)
        if model.name == q.model.name or model.billions[1] >= q.model.billions[0]:
            continue
        precision = replace(FP8, experts="fp8") if q.fleets[0].device.kind == "gpu" else FP8
        for fleet in q.fleets[:1]:
            found = search(model.facts(precision), fleet, q.engine, c, w, q.slo, False, q.loads, ("boxes",))
            layout = cheapest(found, q.users, "boxes") or strongest(found, "boxes")
            if layout is not None:
                out.append(option(q, name, layout, fleet, c, w))
    return out


def _assumptions(q: Question, c: Calibration) -> tuple[str, ...]:
    out = [
        *q.assumed,
        "users: requests in the system at once, each followed at once by the next; lengths as given, all alike",
        "promises hold at p90; time per token varies by 4 % (lengths) and by the prefills met on mixed units",
        f"weights {q.precision_name}, cache {q.precision.kv}; 10 % of memory and 6 GB kept free on each card",
        f"prefill units run at {100 * DESIGN_LOAD:.0f} % of their capacity at most",
        f"power: data-sheet watts of the cards and {100 * BESIDE_CARDS:.0f} % for the rest",
        "all cost is put on output tokens",
        *(["smaller dense models run in fp8"] if q.smaller else []),
    ]
    if not q.engine:
        out.append("engine: none named, so factors are those of an average engine and intervals those of an unseen one")
    if all(s.device.price is None for s in q.fleets) and q.price is None:
        out.append("no published price for this device: cost is left out (give --price)")
    if not q.loads.loads.counts:
        how = "balanced by expert placement, drift as calibrated" if q.loads.balanced else "not balanced"
        out.append(f"expert loads: no statistics given; {how}")
    return tuple(out)


def _why_nothing(q: Question, f: Facts, c: Calibration, w: Workload, can_draft: bool) -> str:
    """Which limit is met first, and the nearest that is possible."""
    fleet = q.fleets[0]
    rooms = [memory(f, g, fleet.device).free for _, g in grids(f, fleet)]
    total = sum(s.n_gpus * s.device.hbm for s in q.fleets) / 1e9
    if max(rooms, default=-1.0) <= 0:
        need = weight_bytes(f) / 1e9
        nodes = fit_nodes(f, fleet)
        return (
            f"{q.model.name} in {q.precision_name} needs {need:,.0f} GB for weights alone and {fleet.n} x "
            f"{fleet.per_node} x {fleet.device.name} have {total:,.0f} GB, not all usable; the nearest that fits is "
            + (f"{nodes} x {fleet.per_node} x {fleet.device.name}" if nodes else "a smaller model or precision")
        )
    floor = floor_tpot(f, fleet, w, can_draft)
    if floor > q.slo.tpot:
        return (
            f"--tpot {q.slo.tpot * 1e3:g}ms is below the physical floor of these servers: reading weights alone takes "
            f"{floor * 1e3:.2f} ms a token; the nearest possible is --tpot {_up(floor * 1e3):g}ms"
        )
    for loosen in (1.5, 2, 3, 5, 10, 30, 100):
        for slo, text in (
            (Slo(q.slo.tpot * loosen, q.slo.ttft), f"--tpot {q.slo.tpot * loosen * 1e3:g}ms"),
            (Slo(q.slo.tpot, q.slo.ttft * loosen), f"--ttft {q.slo.ttft * loosen:g}s"),
            (
                Slo(q.slo.tpot * loosen, q.slo.ttft * loosen),
                f"--tpot {q.slo.tpot * loosen * 1e3:g}ms --ttft {q.slo.ttft * loosen:g}s",
            ),
        ):
            if search(f, fleet, q.engine, c, w, slo, can_draft, q.loads).layouts:
                return f"no layout keeps the promise for even one user; the nearest that some layout keeps is {text}"
    return "no layout of these servers holds one request of this length; ask for shorter input or more servers"


def _up(ms: float) -> float:
    return ceil(ms * 10) / 10


def fit_nodes(f: Facts, fleet: Servers) -> int:
    """Fewest nodes of this kind that hold the model and a request; 0 where 64 do not."""
    for n in range(1, 65):
        if any(memory(f, g, fleet.device).tokens > 1024 for _, g in grids(f, replace(fleet, n=n))):
            return n
    return 0
