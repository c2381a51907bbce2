"""Why nothing serves even one user, and the nearest that would. Messages for one line of a terminal."""

from dataclasses import replace
from math import ceil

from brigade.plan.memory import memory, weight_bytes
from brigade.plan.quantity import Servers
from brigade.plan.question import Question
from brigade.plan.rates import Calibration
from brigade.plan.search import search
from brigade.plan.serving import Workload
from brigade.plan.units import Slo, floor_tpot, grids
from brigade.spec.work import Facts

MOST_NODES = 64
LOOSER = (1.5, 2, 3, 5, 10, 30, 100)
"""Times a promise, in the order in which they are tried."""


def why_nothing(q: Question, f: Facts, c: Calibration, w: Workload) -> str:
    """Which limit is met first, and the nearest that is possible."""
    rooms = [memory(f, g, fleet.device).free for fleet in q.fleets for _, g in grids(f, fleet)]
    fleet = q.fleets[0]
    if max(rooms, default=-1.0) <= 0:
        total = sum(s.n_gpus * s.device.hbm for s in q.fleets) / 1e9
        nodes = fit_nodes(f, fleet)
        nearest = f"{nodes} x {fleet.per_node} x {fleet.device.name}" if nodes else "a smaller model or precision"
        have = " + ".join(f"{s.n} x {s.per_node} x {s.device.name}" for s in q.fleets)
        return (
            f"{q.model.name} in {q.precision_name} needs {weight_bytes(f) / 1e9:,.0f} GB for weights alone and {have} "
            f"have {total:,.0f} GB, not all usable; the nearest that fits is {nearest}"
        )
    floor = min(floor_tpot(f, s, w, q.can_draft) for s in q.fleets)
    if floor > q.slo.tpot:
        return (
            f"--tpot {q.slo.tpot * 1e3:g}ms is below the physical floor of these servers: reading weights alone takes "
            f"{floor * 1e3:.2f} ms a token; the nearest possible is --tpot {ceil(floor * 1e4) / 10:g}ms"
        )
    return nearest_promise(q, f, c, w)


def nearest_promise(q: Question, f: Facts, c: Calibration, w: Workload) -> str:
    """The least loosening of either promise, or of both, that some layout keeps."""
    for times in LOOSER:
        tpot, ttft = q.slo.tpot * times, q.slo.ttft * times
        for slo, text in (
            (Slo(tpot, q.slo.ttft), f"--tpot {tpot * 1e3:.4g}ms"),
            (Slo(q.slo.tpot, ttft), f"--ttft {ttft:.4g}s"),
            (Slo(tpot, ttft), f"--tpot {tpot * 1e3:.4g}ms --ttft {ttft:.4g}s"),
        ):
            if any(search(f, s, q.engine, c, w, slo, q.can_draft, q.loads).layouts for s in q.fleets):
                return f"no layout keeps the promise for even one user; the nearest that some layout keeps is {text}"
    return "no layout of these servers holds one request of this length; ask for shorter input or more servers"


def fit_nodes(f: Facts, fleet: Servers) -> int:
    """Fewest nodes of this kind that hold the model and a request; 0 where MOST_NODES do not."""
    for n in range(1, MOST_NODES + 1):
        if any(memory(f, g, fleet.device).tokens > 1024 for _, g in grids(f, replace(fleet, n=n))):
            return n
    return 0
