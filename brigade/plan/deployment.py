"""The deployment file of an option, as `brigade up` reads it. Host names are placeholders: the planner knows none."""

import json
from math import ceil, floor

from brigade.plan.ask import option
from brigade.plan.memory import memory
from brigade.plan.question import Option, Question
from brigade.plan.rates import Calibration
from brigade.plan.search import cheapest, search, strongest
from brigade.plan.serving import CHUNK, Workload
from brigade.plan.units import BATCHED, Unit
from brigade.spec.deploy import BOUNDS, LOCAL
from brigade.spec.work import Grid

WEIGHTS = {"fp8": "int8", "int8": "int8", "bf16": "bf16", "int4": "int4", "fp4": "int4"}
"""What Brigade's own kernels keep in as many bytes."""
MOST_RANKS = BOUNDS["ranks_per_host"][1]
RUNNING = 64
"""Requests in one step of a rank that prefills only: the engine's default."""
PAGES = 256
"""Positions to which a request's are rounded up: a whole number of the engine's pages."""
STEP_TOKENS = 512
"""The engine's default tokens of a step."""


def runnable(q: Question, c: Calibration) -> Option | None:
    """The cheapest layout that Brigade itself can run and that serves all users, or the strongest; None: there is none.

    Its ranks are attention replicas of one card each.
    """
    if cannot_run(q) is not None:
        return None
    w = Workload(q.users, q.n_in, q.n_out, q.hit)
    f = q.model.facts(q.precision)
    found = [
        search(f, s, q.engine, c, w, q.slo, q.can_draft, q.loads, wanted=lambda g: lacks(g) is None)
        for s in q.fleets
        if s.per_node <= MOST_RANKS
    ]
    layouts = [x for one in found for x in one.layouts if x.family != "pipeline"]
    best = cheapest(layouts, q.users) or strongest(layouts)
    return None if best is None else option(q, q.model.name, best, c, w)


def cannot_run(q: Question) -> str | None:
    """What a question asks for that no deployment of Brigade has; None: nothing."""
    if not q.model.runs:
        return f"{q.model.name}'s architecture"
    if q.precision.kv != "bf16":
        return f"a cache in {q.precision.kv}"
    if all(s.per_node > MOST_RANKS for s in q.fleets):
        return f"more than {MOST_RANKS} ranks on a host"
    return None


def lacks(g: Grid) -> str | None:
    """What a unit's grid needs that Brigade does not have; None: nothing."""
    if g.tp > 1:
        return f"attention over {g.tp} cards (TP{g.tp})"
    return f"{g.pp} pipeline stages (PP{g.pp})" if g.pp > 1 else None


def what_brigade_lacks(o: Option, q: Question) -> str | None:
    """What an option needs that Brigade cannot do; None: nothing."""
    return cannot_run(q) or next((text for u, _ in o.layout.units if (text := lacks(u.grid))), None)


def ranks_per_host(u: Unit) -> int:
    return int(u.grid.n_gpus // n_hosts(u))


def n_hosts(u: Unit) -> int:
    """Of one unit."""
    return max(1, int(u.nodes))


def deployment_yaml(o: Option, q: Question) -> str:
    """YAML text: model, units, their hosts and limits, so that ranks hold as many requests as the plan says."""
    least = min(u.pool.device.hbm for u, _ in o.layout.units)
    hosts = sum(n_hosts(u) * k for u, k in o.layout.units)
    drafts = max(u.pool.setup.draft for u, _ in o.layout.units)
    theirs = "the model's folder" if hosts == 1 else "your hosts' addresses, the model's folder and your key file"
    lines = [
        f"# written by brigade plan: {o.name}",
        f"# {o.why}",
        f"# put {theirs} in place of these",
        f"model: {json.dumps(q.model.folder)}" if q.model.folder else f"model: {q.model.name}",
        f"weights: {WEIGHTS[q.precision_name]}",
        *([f"drafts: {drafts}"] if drafts else []),
        f"rank_memory: {int(least // 1e9)}GB",
        "listen: 127.0.0.1:8000",
        *(["secret_file: keys/hosts"] if hosts > 1 else []),
        "units:",
    ]
    first = 1
    for u, k in o.layout.units:
        n = n_hosts(u) * k
        names = [LOCAL] if hosts == 1 else [f"node{i}" for i in range(first, first + n)]
        first += n
        lines += [
            f"  - role: {u.role}",
            f"    count: {k}",
            f"    hosts: [{', '.join(names)}]",
            f"    ranks_per_host: {ranks_per_host(u)}",
        ]
        if u.grid.redundant:
            lines.append(f"    redundant_experts: {u.grid.redundant}")
        lines += ["    limits:", *(f"      {name}: {value}" for name, value in limits(u, q, drafts).items())]
    return "\n".join(lines) + "\n"


def limits(u: Unit, q: Question, drafts: int) -> dict[str, int | str]:
    """What one rank of a unit takes on. Left out, its cache would be a quarter of what is free, and its steps short."""
    most = BOUNDS["max_running"][1]
    running = RUNNING if u.role == "prefill" else max(1, min(most, ceil(u.users / u.grid.dp)))
    context = q.n_in + q.n_out
    held = memory(u.pool.f, u.grid, u.pool.device, drafts=drafts)
    prompts = STEP_TOKENS if u.role == "decode" else min(CHUNK, max(BATCHED, q.n_in))
    positions = running * -(-context // PAGES) * PAGES
    kilobytes = floor(min(held.free, positions * held.kv_token) / 1e3)
    return {
        "max_running": running,
        "max_context": context,
        "max_step_tokens": max(prompts, running * (1 + drafts)),
        "kv_memory": f"{max(1, kilobytes)}KB",
    }
