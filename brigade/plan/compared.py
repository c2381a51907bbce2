"""The analytic estimate beside the simulator, for one layout: closed-loop users, or a trace at a rate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from brigade.plan.arrivals import Arrival, Users, means
from brigade.plan.ask import serve
from brigade.plan.rates import Calibration
from brigade.plan.search import Layout
from brigade.plan.serving import P90, P99, Served, Workload
from brigade.plan.simulate import MIXED_STEP, Overload, Seen, Simulated, Simulation

WARM_UP = 0.4
"""Share of the simulated time before requests count."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Beside:
    """One quantity, both ways; seconds."""

    what: str
    analytic: float
    simulated: float

    @property
    def error(self) -> float:
        """Of the analytic estimate."""
        return self.analytic / self.simulated - 1 if self.simulated else 0.0


def simulate_users(layout: Layout, c: Calibration, users: Users, seconds: float, seed: int) -> Simulated:
    """Users who ask again when they are answered."""
    s = Simulation(layout, c, seed, MIXED_STEP)
    s.again = lambda seen: users.next(seen.user, s.now, s.random)
    s.run(enumerate(users.first(s.random)), seconds)
    return _seen(s, seconds)


def simulate_trace(layout: Layout, c: Calibration, trace: Sequence[Arrival], seconds: float, seed: int) -> Simulated:
    """Requests at the times of a trace. Raises Overload where a request can never run."""
    s = Simulation(layout, c, seed, MIXED_STEP)
    try:
        s.run(enumerate(trace), seconds)
    except ValueError as e:
        raise Overload(str(e)) from e
    return _seen(s, seconds)


def _seen(s: Simulation, seconds: float) -> Simulated:
    begin = WARM_UP * seconds
    done = tuple(x for x in s.finished if x.arrival.at >= begin)
    if len(done) < 10:
        raise Overload(
            f"only {len(done)} requests were answered after the warm-up of {begin:.0f} s; {s.inside} are inside: "
            "simulate more --seconds, or ask for less"
        )
    preempted = sum(rank.n_preempted for unit in s.units for rank in unit.ranks)
    return Simulated(done, seconds - begin, s.area / s.now, preempted, s.n_steps)


def quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def beside(served: Served, found: Simulated) -> list[Beside]:
    """TTFT and TPOT at p50, p90, p99."""
    out = []
    tpot = served.tpot, served.tpot_quantile(P90), served.tpot_quantile(P99)
    for q, per_token in zip(QUANTILES, tpot, strict=True):
        label = f"p{100 * q:.0f}"
        out.append(Beside(f"TTFT {label}", served.ttft_quantile(q), quantile((x.ttft for x in found.requests), q)))
        out.append(Beside(f"TPOT {label}", per_token, quantile((_tpot(x) for x in found.requests), q)))
    return sorted(out, key=lambda x: x.what)


def _tpot(seen: Seen) -> float:
    return seen.tpot


def without_engines_own_delays(c: Calibration) -> Calibration:
    """What the simulator knows too: prompts take their own time, and queues and gates the rest."""
    own = {"alone": 1.0, "alone_apart": 1.0, "waiting": 1.0, "burst": 0.0}
    return replace(c, rates=replace(c.rates, **own))


def served_at(layout: Layout, c: Calibration, w: Workload, rate: float) -> Served:
    """The analytic estimate for requests that come at a rate: as many users as make it (Little's law)."""
    low, high = 0.0, layout.users * 4
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if serve(layout, c, replace(w, users=middle)).rate < rate else (low, middle)
    return serve(layout, c, replace(w, users=high))


def trace_workload(trace: Sequence[Arrival], hit: float) -> Workload:
    m = means(trace)
    return Workload(1.0, round(m["n_in"]), max(1, round(m["n_out"])), hit)
