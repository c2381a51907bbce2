"""What is said about an answer: names, reasons, the turning point, notes and assumptions. Decides nothing."""

from collections.abc import Mapping
from math import ceil, exp, inf

from brigade.plan.memory import kept_bytes, memory
from brigade.plan.night import night_of
from brigade.plan.question import Option, Question
from brigade.plan.rates import Calibration
from brigade.plan.say import Say, say
from brigade.plan.search import FAMILIES, Found, Layout
from brigade.plan.serving import DESIGN_LOAD
from brigade.plan.units import Unit

NAMES: Mapping[str, Say] = {
    "boxes": say("all-in-one boxes"),
    "wide mixed": say("one unit over nodes, prefill and decode mixed"),
    "cluster": say("expert-parallel cluster, prefill and decode apart"),
    "two kinds": say("prefill on one kind of servers, decode on the other"),
    "pipeline": say("pipeline stages (no measurement fitted)"),
}
LIMITS: Mapping[str, Say] = {
    "kv memory": say("the cache fills its memory"),
    "tpot": say("the time per token reaches the promise"),
    "ttft": say("prompts would wait longer than the promise"),
    "prefill load": say("prefills take all the time that decoding leaves"),
    "prefill": say("its prefill units are at their planned load"),
    "batch": say("no engine runs larger batches"),
}


def describe(layout: Layout) -> Say:
    """ "1 x prefill EP32 (4 nodes) + 1 x decode EP144 (18 nodes, 32 spare slots, drafting 1)"."""
    parts = [_unit(u, k, layout.family == "two kinds") for u, k in layout.units]
    return parts[0] if len(parts) == 1 else say("{a} + {b}", a=parts[0], b=parts[1])


ROLES: Mapping[str, Say] = {"mixed": say("mixed"), "prefill": say("prefill"), "decode": say("decode")}


def _unit(u: Unit, k: int, name_device: bool) -> Say:
    g = u.grid
    ways = [f"EP{g.ep}"] if g.ep > 1 else []
    ways += [f"TP{g.tp}"] if g.tp > 1 else []
    ways += [f"PP{g.pp}"] if g.pp > 1 else []
    ways += [f"DP{g.dp}"] if g.dp > 1 and g.ep == 1 else []
    device = f" {u.pool.device.name}" if name_device else ""
    inner = say("{n:g} node{s}", n=u.nodes, s="" if u.nodes == 1 else "s")
    if g.redundant:
        inner = say("{inner}, {n} spare slots", inner=inner, n=g.redundant)
    if u.pool.setup.draft:
        inner = say("{inner}, drafting {n}", inner=inner, n=u.pool.setup.draft)
    how = " ".join(ways) or say("replica")
    return say("{k} x {role}{device} {how} ({inner})", k=k, role=ROLES[u.role], device=device, how=how, inner=inner)


def why(layout: Layout, limit: str) -> Say:
    unit = layout.units[-1][0]
    pool, g = unit.pool, unit.grid
    gigabytes = memory(pool.f, g, pool.device, drafts=pool.setup.draft).weights / 1e9
    each = unit.users / max(g.dp, 1)
    held = say(
        "each card holds {gigabytes:.3g} GB of weights and {each:.0f} requests of a replica",
        gigabytes=gigabytes, each=each,
    )  # fmt: skip
    if not pool.f.n_moe:
        return say("dense, {held}; {limit}", held=held, limit=LIMITS.get(limit, limit))
    rows = unit.users / g.pp * pool.f.top_k / max(pool.f.n_experts + g.redundant, 1)
    return say(
        "{held}, an expert gets {rows:.0f} rows a step; {limit}", held=held, rows=rows, limit=LIMITS.get(limit, limit)
    )


def sentence(q: Question, best: Option | None, options: list[Option]) -> Say:
    if best is None:
        most = max(options, key=lambda o: o.most_users)
        return say(
            "These servers cannot keep the promise for {users:,} users; the nearest is {most:,.0f} users on {name}, "
            "and about {nodes:,} nodes would serve all.",
            users=q.users, most=most.most_users, name=most.name,
            nodes=ceil(most.layout.nodes * q.users / most.most_users),
        )  # fmt: skip
    head = say(
        "Run {name}: {used:g} of {have} nodes serve {users:,} users",
        name=best.name, used=best.layout.nodes, have=q.n_nodes, users=q.users,
    )  # fmt: skip
    others = [o for o in options if (o.family, o.devices) != (best.family, best.devices)]
    if not others and best.family == "boxes":
        return say("{head}.", head=head)
    if not others:
        return say("{head}; a single box cannot hold the model with a request beside it.", head=head)
    clusters = [o for o in others if o.family != "boxes"]
    if best.family == "boxes" and clusters and all(o.layout.hourly >= best.layout.hourly for o in clusters):
        least = min(clusters, key=lambda o: o.layout.hourly)
        return say(
            "{head}. Do not build a cluster: it would take {least:g} node{s} for the same.",
            head=head, least=least.layout.nodes, s="" if least.layout.nodes == 1 else "s",
        ) if least.fits else say("{head}. Do not build a cluster: none serves as many.", head=head)  # fmt: skip
    several = len(q.fleets) > 1
    rest = tuple(say("{name}: {what}", name=_family(o, several), what=_instead(o)) for o in others)
    return say("{head}; {rest}.", head=head, rest=rest)


def _family(o: Option, several: bool) -> Say:
    if not several or o.family == "two kinds":
        return NAMES[o.family]
    return say("{name} of {device}", name=NAMES[o.family], device=o.devices[0].name)


def _instead(o: Option) -> Say:
    if o.fits:
        return say("{n:g} node{s}", n=o.layout.nodes, s="" if o.layout.nodes == 1 else "s")
    return say("{users:,.0f} users at most, because {limit}", users=o.most_users, limit=LIMITS.get(o.limit, o.limit))


def crossover_curve(found: Found) -> tuple[tuple[int, dict[str, float]], ...]:
    """Nodes needed by each family at every number of users where one of them changes."""
    marks = sorted({int(x.users) for x in found.layouts if x.users >= 1})
    rows: list[dict[str, float]] = [{} for _ in marks]
    for family in FAMILIES:
        left = sorted((x for x in found.layouts if x.family == family), key=lambda x: x.users)
        nodes = float("inf")
        for i in range(len(marks) - 1, -1, -1):
            while left and left[-1].users >= marks[i]:
                nodes = min(nodes, left.pop().nodes)
            if nodes < float("inf"):
                rows[i][family] = nodes
    return tuple(zip(marks, rows, strict=True))


def crossover(found: Found) -> Say:
    curve = crossover_curve(found)
    if not any("boxes" in row for _, row in curve):
        return say("a single box cannot hold the model and its requests, so every size needs a unit over nodes")
    if not any("cluster" in row for _, row in curve):
        return say("no cluster of these servers keeps the promise")
    both = [(users, row) for users, row in curve if "boxes" in row or "cluster" in row]
    wins = [row.get("cluster", inf) < row.get("boxes", inf) for _, row in both]
    if not any(wins):
        return say("boxes need no more nodes than a cluster at any number of users that these servers reach")
    first, last = wins.index(True), len(wins) - 1
    while last >= 0 and wins[last]:
        last -= 1
    below = both[first - 1][0] if first else 0
    if last < first:
        return say(
            "below {below:,} concurrent users boxes need no more nodes; above, the cluster needs fewer", below=below
        )
    if last == len(wins) - 1:
        return say(
            "below {below:,} concurrent users boxes need no more nodes; above, sometimes the cluster needs fewer: "
            "units are whole",
            below=below,
        )
    return say(
        "below {below:,} concurrent users boxes need no more nodes; above {above:,}, the cluster needs fewer; between, "
        "sometimes one, sometimes the other: units are whole",
        below=below, above=both[last][0],
    )  # fmt: skip


def notes(q: Question, best: Option, c: Calibration, beside: float) -> tuple[Say, ...]:
    out = []
    if q.api_price is not None and best.cost is not None:
        use = 100 * best.cost / q.api_price
        if use <= 100:
            even = "break-even: at ${price:g} per million output tokens the servers pay at {use:.0f} % of this load"
        else:
            even = "break-even: at ${price:g} per million output tokens they never pay: {use:.0f} % of this load"
        out.append(say(even, price=q.api_price, use=use))
    if q.night is not None:
        out.append(_night(q, best, beside))
    out.append(narrowing(best, c))
    out += [
        say("weak sources for {device}: {fields}", device=d.name, fields=", ".join(sorted(d.weak)))
        for d in best.devices
        if d.weak
    ]
    return tuple(out)


def _night(q: Question, best: Option, beside: float) -> Say:
    """Which units may sleep, and what that is worth."""
    assert q.night is not None
    at = night_of(best.layout, best.users * q.night)
    asleep = best.layout.nodes - at.nodes
    kilowatts = sum(
        u.grid.n_gpus * (k - left) * u.pool.device.watts * (1 + beside) / 1e3
        for (u, k), (_, left) in zip(best.layout.units, at.units, strict=True)
    )
    head = say(
        "at night, with {share:.0%} of the users, {units} suffice: {asleep:g} of {nodes:g} nodes sleep, {kwh:,.0f} kWh "
        "a night of {hours:g} h",
        share=q.night, units=describe(at), asleep=asleep, nodes=best.layout.nodes,
        kwh=kilowatts * q.night_hours, hours=q.night_hours,
    )  # fmt: skip
    if best.cost is None:
        return head
    return say(
        "{head}, ${dollars:,.0f} where cards are paid by the hour",
        head=head, dollars=(best.layout.hourly - at.hourly) * q.night_hours,
    )  # fmt: skip


def narrowing(best: Option, c: Calibration) -> Say:
    """Which measurement would narrow the interval most."""
    widest, phase, unit = 0.0, "decode", best.layout.units[0][0]
    for u, _ in best.layout.units:
        for one in ("prefill", "decode") if u.role == "mixed" else (u.role,):
            half = c.half_width(u.pool.engine, u.pool.device.name, one)
            if half > widest:
                widest, phase, unit = half, one, u
    device = unit.pool.device.name
    if c.knows(unit.pool.engine, device, phase) == "engine+hardware":
        return say(
            "the interval is widest in {phase}; measure it on your own load and give it to --calibrate",
            phase=ROLES[phase],
        )
    then = c.spread.get(f"{phase}/engine+hardware", 0.2)
    return say(
        "measuring {phase} once with your engine on {device} (--calibrate) would narrow the interval most: from "
        "+-{now:.0f} % to +-{then:.0f} %",
        phase=ROLES[phase], device=device, now=100 * (exp(widest) - 1), then=100 * (exp(then) - 1),
    )  # fmt: skip


def assumptions(q: Question, beside: float) -> tuple[Say, ...]:
    """Whatever the question left open, and what the planner takes for granted."""
    out = [
        *q.assumed,
        say("users: requests in the system at once, each followed at once by the next; lengths as given, all alike"),
        say("promises hold at p90; time per token varies by 4 % (lengths) and by the prefills met on mixed units"),
        say(
            "weights {weights}, cache {kv}; 10 % of memory and {kept:g} GB kept free on each card",
            weights=q.precision_name, kv=q.precision.kv, kept=kept_bytes(q.fleets[0].device) / 1e9,
        ),
        say("prefill units run at {load:.0f} % of their capacity at most", load=100 * DESIGN_LOAD),
        say("power: data-sheet watts of the cards and {beside:.0f} % for the rest", beside=100 * beside),
        say("all cost is put on output tokens"),
    ]  # fmt: skip
    if q.smaller:
        out.append(say("smaller dense models run in fp8"))
    if not q.engine:
        out.append(
            say("engine: none named, so factors are those of an average engine and intervals those of an unseen one")
        )
    for device in dict.fromkeys(s.device for s in q.fleets if s.device.price is None):
        out.append(say("no published price for {device}: its cost is left out (give --price)", device=device.name))
    if not q.loads.loads.counts:
        out.append(
            say("expert loads: no statistics given; balanced by expert placement, drift as calibrated")
            if q.loads.balanced
            else say("expert loads: no statistics given; not balanced")
        )
    return tuple(out)
