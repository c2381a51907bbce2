"""From a question to its answer: options side by side, one recommended, each with its reason.

Nothing is guessed in silence: whatever the question left open is in `assumptions`.
"""

from dataclasses import replace
from math import exp, sqrt

from brigade.plan.models import find_model
from brigade.plan.nearest import why_nothing
from brigade.plan.quantity import Servers
from brigade.plan.question import Answer, Impossible, Option, Question
from brigade.plan.rates import Calibration
from brigade.plan.reasons import assumptions, crossover, crossover_curve, describe, notes, sentence, why
from brigade.plan.search import FAMILIES, Found, Layout, across, cheapest, search, strongest
from brigade.plan.serving import P90, P99, Served, Workload, disaggregated, mixed, steady
from brigade.plan.units import Unit, gathered
from brigade.spec.work import FP8, Facts

BESIDE_CARDS = 0.35
"""Power of a server beyond its accelerators (hosts, NICs, switches, cooling), as a share of theirs."""
WEAK = 0.2
"""Widening of an interval's logarithm by a device whose peak rates rest on a weak source, and by pipeline stages, of
which no published measurement was fitted."""
SMALLER = ("r1-distill-llama-70b", "r1-distill-qwen-32b")
"""Dense models of the same family, offered beside."""


def answer(q: Question, c: Calibration) -> Answer:
    """Searches every kind of servers, and clusters over two of them. Raises Impossible where nothing serves a user."""
    w = Workload(q.users, q.n_in, q.n_out, q.hit)
    f = q.model.facts(q.precision)
    found = tuple((fleet, search(f, fleet, q.engine, c, w, q.slo, q.can_draft, q.loads)) for fleet in q.fleets)
    over_two, n_across = across(found)
    options = [o for _, one in found for o in _options(q, one.layouts, c, w)] + _options(q, over_two, c, w)
    if not options:
        raise Impossible(why_nothing(q, f, c, w))
    fitting = [o for o in options if o.fits]
    best = min(fitting, key=_preferred) if fitting else None
    main = list(options)
    if q.smaller:
        options += _smaller(q, f, c, w)
    options.sort(key=lambda o: (o is not best, not o.fits, o.layout.hourly))
    one = found[0][1]
    return Answer(
        q,
        tuple(options),
        best,
        sentence(q, best, main),
        crossover(one),
        notes(q, best or max(main, key=lambda o: o.most_users), c, BESIDE_CARDS),
        assumptions(q, BESIDE_CARDS),
        found,
        n_across,
        c.about,
        crossover_curve(one),
    )


def _preferred(o: Option) -> tuple[bool, float]:
    """The cheapest; pipelines only where nothing else keeps the promise, since no measurement of one was fitted."""
    return o.family == "pipeline", o.layout.hourly


def _options(q: Question, layouts: tuple[Layout, ...], c: Calibration, w: Workload) -> list[Option]:
    """For each family the cheapest that serves all, or the strongest."""
    out = []
    for family in FAMILIES:
        layout = cheapest(layouts, q.users, family) or strongest(layouts, family)
        if layout is not None:
            out.append(option(q, q.model.name, layout, c, w))
    return out


def option(q: Question, model: str, layout: Layout, c: Calibration, w: Workload) -> Option:
    """A layout at the users asked for."""
    users = min(float(q.users), layout.users)
    served = serve(layout, c, replace(w, users=users))
    tokens = served.rate * w.n_out
    half = interval(layout, c)
    full = layout.rate * w.n_out / layout.n_gpus
    ttft = tuple(served.ttft_quantile(p) for p in (0.5, 0.9, 0.99))
    limit = layout.limit
    watts = sum(u.grid.n_gpus * k * u.pool.device.watts for u, k in layout.units)
    return Option(
        name=describe(layout),
        family=layout.family,
        model=model,
        layout=layout,
        fits=layout.users >= q.users,
        users=users,
        most_users=layout.users,
        most_users_range=(layout.users * exp(-half), layout.users * exp(half)),
        served=served,
        tokens_per_gpu=tokens / layout.n_gpus,
        tokens_per_node=tokens / layout.nodes,
        tokens_range=(full * exp(-half), full * exp(half)),
        ttft_factor=exp(ttft_half(layout, c)),
        tpot_factor=exp(phase_half(layout.units[-1][0], "decode", c)),
        ttft=(ttft[0], ttft[1], ttft[2]),
        tpot=(served.tpot, served.tpot_quantile(P90), served.tpot_quantile(P99)),
        cost=dollars(layout, tokens),
        kilowatts=watts * (1 + BESIDE_CARDS) / 1e3,
        limit=limit,
        why=why(layout, limit),
    )


def dollars(layout: Layout, tokens: float) -> float | None:
    """Per million output tokens at that rate; None where a card's price is not known."""
    if any(u.pool.device.price is None for u, _ in layout.units):
        return None
    return layout.hourly / (tokens * 3600 / 1e6)


def serve(layout: Layout, c: Calibration, w: Workload) -> Served:
    """What the users of a layout see."""
    pools = [(u.role, replace(u.pool, n_units=k)) for u, k in layout.units]
    if len(pools) == 1:
        return mixed(pools[0][1], steady(c), w)
    prefill = next(p for role, p in pools if role == "prefill")
    decode = next(p for role, p in pools if role == "decode")
    c = steady(c)
    return disaggregated(prefill, decode, c, w, busy=gathered(prefill, c, w))


def interval(layout: Layout, c: Calibration) -> float:
    """Half width of the 80 % interval of the layout's throughput, as a logarithm."""
    return max(
        phase_half(u, phase, c)
        for u, _ in layout.units
        for phase in (("prefill", "decode") if u.role == "mixed" else (u.role,))
    )


def phase_half(u: Unit, phase: str, c: Calibration) -> float:
    """The same of a unit's time in one phase."""
    return widened(c.half_width(u.pool.engine, u.pool.device.name, phase), u)


def ttft_half(layout: Layout, c: Calibration) -> float:
    """The same of its time to first token."""
    u = layout.units[0][0]
    return widened(c.ttft_half_width(u.pool.engine, u.pool.device.name, len(layout.units) > 1), u)


def widened(half: float, u: Unit) -> float:
    """By what rests on weak sources or was never measured."""
    weak = u.pool.device.is_weak + (u.grid.pp > 1)
    return sqrt(half**2 + weak * WEAK**2)


def _smaller(q: Question, f: Facts, c: Calibration, w: Workload) -> list[Option]:
    """Dense models on the first kind of servers, for those who can do with one."""
    out = []
    for name in SMALLER:
        model = find_model(name)
        if model.name == q.model.name or model.billions[1] >= q.model.billions[0]:
            continue
        fleet: Servers = q.fleets[0]
        found: Found = search(model.facts(FP8), fleet, q.engine, c, w, q.slo, False, q.loads, ("boxes",))
        layout = cheapest(found.layouts, q.users, "boxes") or strongest(found.layouts, "boxes")
        if layout is not None:
            out.append(option(q, name, layout, c, w))
    return out
