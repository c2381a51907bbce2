"""All layouts of a fleet that fit, and what each serves; exact, because a cluster is the product of its units.

1. Units (units.py): every grid of 1 to n nodes (EP over any number of them, spare expert slots, attention TP, pipeline
   stages, drafting), each once at its best.
2. Layouts: k boxes, k wide units, or P prefill units + D decode units in whole numbers that fit into the nodes, of one
   kind of servers or of two; each is arithmetic on step 1.
3. Kept are those on the Pareto front of what is paid and users served.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from math import ceil

from brigade.plan.quantity import Servers
from brigade.plan.rates import Calibration
from brigade.plan.serving import Workload
from brigade.plan.step import PLAIN, Setup
from brigade.plan.units import Slo, Unit, Units, units_of
from brigade.spec.work import Facts, Grid

FAMILIES = ("boxes", "wide mixed", "cluster", "two kinds", "pipeline")


@dataclass(frozen=True)
class Layout:
    """A deployment: some units of one or two kinds."""

    units: tuple[tuple[Unit, int], ...]
    nodes: float
    users: float
    """Users it keeps the promise for."""
    rate: float

    @cached_property
    def n_gpus(self) -> int:
        return sum(u.grid.n_gpus * k for u, k in self.units)

    @cached_property
    def hourly(self) -> float:
        """What is paid for: dollars an hour where prices are known, else accelerators."""
        return sum(u.grid.n_gpus * k * (u.pool.device.price or 1.0) for u, k in self.units)

    @cached_property
    def limit(self) -> str:
        """What binds: of the decode or mixed units, or 'prefill' where the prefill units cannot bring them enough."""
        unit, k = self.units[-1]
        if len(self.units) > 1 and self.rate < 0.999 * unit.rate * k:
            return "prefill"
        return unit.limit

    @cached_property
    def family(self) -> str:
        if any(u.grid.pp > 1 for u, _ in self.units):
            return "pipeline"
        devices = {u.pool.device.name for u, _ in self.units}
        if len(self.units) > 1:
            return "cluster" if len(devices) == 1 else "two kinds"
        return "boxes" if self.units[0][0].nodes <= 1 else "wide mixed"


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    layouts: tuple[Layout, ...]
    """The Pareto front: cheapest to most users, of each family."""
    n_considered: int
    units: Units


def search(
    f: Facts,
    fleet: Servers,
    engine: str,
    c: Calibration,
    w: Workload,
    slo: Slo,
    can_draft: bool,
    loads: Setup = PLAIN,
    families: tuple[str, ...] = FAMILIES,
    wanted: Callable[[Grid], bool] = lambda _: True,
) -> Found:
    """The Pareto front of every family over all nodes of one kind of servers, of units whose grids are wanted."""
    units = units_of(f, fleet, engine, c, w, slo, can_draft, loads, families, wanted)
    layouts: list[Layout] = []
    n_considered = 0
    for only in (plain(units), units) if "pipeline" in families else (plain(units),):
        some, n = combined(only, fleet.n)
        n_considered = max(n_considered, n)
        layouts += some if not layouts else [x for x in some if x.family == "pipeline"]
    return Found(pareto(layouts), n_considered, units)


def plain(units: Units) -> Units:
    """Those without pipeline stages."""

    def kept(some: tuple[Unit, ...]) -> tuple[Unit, ...]:
        return tuple(u for u in some if u.grid.pp == 1)

    return replace(units, prefill=kept(units.prefill), decode=kept(units.decode), mixed=kept(units.mixed))


def combined(units: Units, nodes: int) -> tuple[list[Layout], int]:
    """All layouts of units of one kind of servers that could be best, and how many there are."""
    alone = [
        Layout(((u, k),), u.nodes * k, u.users * k, u.rate * k)
        for u in best_by_nodes(units.mixed, lambda u: u.users)
        for k in range(1, int(nodes // u.nodes) + 1)
    ]
    pairs, n = clusters(
        best_by_nodes(units.prefill, lambda u: u.rate), best_by_nodes(units.decode, lambda u: u.users), nodes
    )
    more = n * _alike(units.prefill) * _alike(units.decode)
    return alone + pairs, sum(int(nodes // u.nodes) for u in units.mixed) + more


def across(fleets: Iterable[tuple[Servers, Found]]) -> tuple[tuple[Layout, ...], int]:
    """The front of clusters whose prefill units are of one kind of servers and whose decode units are of another, and
    how many were considered."""
    out: list[Layout] = []
    for (first, a), (second, b) in permutations(fleets, 2):
        prefill = best_by_nodes(plain(a.units).prefill, lambda u: u.rate)
        decode = best_by_nodes(plain(b.units).decode, lambda u: u.users)
        out += crossed(prefill, first.n, decode, second.n)
    return pareto(out), len(out)


def _alike(units: tuple[Unit, ...]) -> int:
    """Units for each number of nodes, of which the best stands for all."""
    return max(1, len(units) // max(1, len({u.nodes for u in units})))


def best_by_nodes(units: Iterable[Unit], worth: Callable[[Unit], float]) -> list[Unit]:
    """Of units with the same number of nodes, the best: any layout with another would be no better."""
    out: dict[float, Unit] = {}
    for u in units:
        if u.nodes not in out or worth(u) > worth(out[u.nodes]):
            out[u.nodes] = u
    return list(out.values())


def clusters(prefill: list[Unit], decode: list[Unit], nodes: int) -> tuple[list[Layout], int]:
    """P prefill + D decode units that fit, the best for each number of nodes; also how many there are."""
    best: dict[float, tuple[float, Unit, int, Unit, int]] = {}
    n = 0
    for d in decode:
        for n_d in range(1, int(nodes // d.nodes) + 1):
            used, need = d.nodes * n_d, d.rate * n_d
            for p in prefill:
                most = int((nodes - used) // p.nodes)
                n += most
                if not most:
                    continue
                enough = ceil(need / p.rate - 1e-9)
                for n_p in {min(most, enough), min(most, max(1, enough - 1))}:
                    users = served_by(p, n_p, d, n_d)[0]
                    key = used + p.nodes * n_p
                    if key not in best or users > best[key][0]:
                        best[key] = users, p, n_p, d, n_d
    return [joined(p, n_p, d, n_d) for _, p, n_p, d, n_d in best.values()], n


def crossed(prefill: list[Unit], prefill_nodes: int, decode: list[Unit], decode_nodes: int) -> list[Layout]:
    """The same where the two kinds of units have nodes of their own: as many prefill units as the decode units need."""
    out = []
    for d in decode:
        for n_d in range(1, int(decode_nodes // d.nodes) + 1):
            for p in prefill:
                most = int(prefill_nodes // p.nodes)
                if most:
                    out.append(joined(p, min(most, ceil(d.rate * n_d / p.rate - 1e-9)), d, n_d))
    return out


def served_by(p: Unit, n_p: int, d: Unit, n_d: int) -> tuple[float, float]:
    """Users, and requests per second: prompts and tokens both bind. Where prompts do, fewer requests decode, faster."""
    rate = min(d.rate * n_d, p.rate * n_p)
    return n_d * d.inside(rate / n_d) + rate * p.ttft, rate


def joined(p: Unit, n_p: int, d: Unit, n_d: int) -> Layout:
    """A cluster of some prefill and some decode units."""
    users, rate = served_by(p, n_p, d, n_d)
    return Layout(((p, n_p), (d, n_d)), d.nodes * n_d + p.nodes * n_p, users, rate)


def pareto(layouts: list[Layout]) -> tuple[Layout, ...]:
    """For each family, the layouts that none as cheap outdoes in users."""
    out: list[Layout] = []
    for family in FAMILIES:
        most = 0.0
        for one in sorted((x for x in layouts if x.family == family), key=lambda x: (x.hourly, -x.users)):
            if one.users > most * 1.0001:
                out.append(one)
                most = one.users
    return tuple(out)


def cheapest(layouts: Iterable[Layout], users: float, family: str | None = None) -> Layout | None:
    """The cheapest that serves so many users, or None."""
    fit = [x for x in layouts if x.users >= users and family in (None, x.family)]
    return min(fit, key=lambda x: (x.hourly, -x.users), default=None)


def strongest(layouts: Iterable[Layout], family: str | None = None) -> Layout | None:
    """Most users."""
    fit = [x for x in layouts if family in (None, x.family)]
    return max(fit, key=lambda x: (x.users, -x.hourly), default=None)
