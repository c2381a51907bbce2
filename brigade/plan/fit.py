"""Fits rates and group factors to measured cases: least squares of logarithms with priors, robust, plain Python.

    minimise  sum w_i (log predicted - log measured)^2 / sd_i^2
              + sum (log rate - log prior)^2 / sd^2 + sum (log factor)^2 / sd^2

by Gauss-Newton with a damping; w_i = 1 / (1 + (r_i / 3)^2) lets a point that fits nothing pull less (Student's t). A
source is left out by solving again without its rows at the full fit's derivatives, twice.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import exp, log

from brigade.plan.case import Case
from brigade.plan.rates import LEVELS, PRIOR_SD, TTFT_SD, Calibration, Rates, group_names, moved, ttft_name
from brigade.spec.device import DEVICES

TAIL = 3.0
TTFT_TAIL = 1.0
"""Of times to first token: the Cauchy loss. A tenth of the published ones are warm-up (seconds where equal rows say a
fifth of one), and rows do not say which."""
GPUS = {d.name for d in DEVICES.values() if d.kind == "gpu"}
STEP = 0.02
PHASES = {"prefill": ("prefill",), "decode": ("decode",), "mixed": ("decode", "prefill"), "tpot": ("decode", "prefill"),
          "ttft": ("prefill", "decode")}  # fmt: skip


@dataclass
class Problem:
    """Cases, and the unknowns they speak about."""

    cases: Sequence[Case]
    names: list[str]
    prior_sd: list[float]
    prior: list[float]
    """Where each unknown's logarithm is pulled to: 0 unless a fit is carried on."""

    def calibration(self, x: Sequence[float]) -> Calibration:
        rates, factors = Rates(), {}
        for name, value in zip(self.names, x, strict=True):
            if name in PRIOR_SD:
                rates = moved(rates, name, value)
            else:
                factors[name] = value
        return Calibration(rates, factors)


def groups_of(case: Case) -> set[str]:
    names = {g for phase in PHASES[case.phase] for g in group_names(case.engine, case.hardware, phase)}
    return names | {ttft_name(case.engine, case.hardware, case.kind == "rows")} if case.phase == "ttft" else names


def problem(cases: Sequence[Case]) -> Problem:
    """All rates, and the groups of each case."""
    names = [f.name for f in fields(Rates)]
    sds = [PRIOR_SD[n] for n in names]
    groups: dict[str, float] = {}
    for case in cases:
        for g in groups_of(case):
            groups[g] = TTFT_SD if "/ttft" in g else LEVELS[g.count("/")][1]
    for g in sorted(groups):
        names.append(g)
        sds.append(groups[g])
    return Problem(cases, names, sds, [0.0] * len(names))


def tail(case: Case) -> float:
    """Standard deviations beyond which a residual pulls less and less."""
    return TTFT_TAIL if case.phase == "ttft" else TAIL


def residual(case: Case, c: Calibration) -> float:
    """log predicted - log measured."""
    return log(max(case.predicted(c), 1e-12) / case.measured)


@dataclass
class Linear:
    """Residuals and derivatives of the cases at a point x."""

    x: list[float]
    r: list[float]
    j: list[dict[int, float]]


def linearize(p: Problem, x: list[float], with_j: bool = True) -> Linear:
    c = p.calibration(x)
    r = [residual(case, c) for case in p.cases]
    j: list[dict[int, float]] = [{} for _ in p.cases]
    if with_j:
        belongs = [groups_of(case) for case in p.cases]
        for k, name in enumerate(p.names):
            y = list(x)
            y[k] += STEP
            ck = p.calibration(y)
            for i, case in enumerate(p.cases):
                if name in PRIOR_SD or name in belongs[i]:
                    d = (residual(case, ck) - r[i]) / STEP
                    if d:
                        j[i][k] = d
    return Linear(x, r, j)


def solve_step(p: Problem, lin: Linear, rows: Iterable[int], damp: float = 0.0) -> list[float]:
    """The x that minimises the linearised sum over these rows, priors included."""
    n = len(p.names)
    a = [[0.0] * n for _ in range(n)]
    b = [0.0] * n
    for k in range(n):
        w = 1 / p.prior_sd[k] ** 2
        a[k][k] = w * (1 + damp)
        b[k] = -w * (lin.x[k] - p.prior[k])
    for i in rows:
        sd = p.cases[i].sd
        w = 1 / sd**2 / (1 + (lin.r[i] / sd / tail(p.cases[i])) ** 2)
        items = list(lin.j[i].items())
        for k, dk in items:
            wd = w * dk
            b[k] -= wd * lin.r[i]
            row = a[k]
            for m, dm in items:
                row[m] += wd * dm
    step = cholesky_solve(a, b)
    return [lin.x[k] + max(-0.7, min(0.7, step[k])) for k in range(n)]


def cholesky_solve(a: list[list[float]], b: list[float]) -> list[float]:
    """x with a x = b, for a symmetric positive definite; `a` is destroyed."""
    n = len(b)
    for k in range(n):
        row = a[k]
        pivot = row[k]
        if pivot <= 0:
            raise ArithmeticError(f"the system is singular at unknown {k}")
        for i in range(k + 1, n):
            if row[i]:
                ratio = row[i] / pivot
                other = a[i]
                for m in range(i, n):
                    if row[m]:
                        other[m] -= ratio * row[m]
                b[i] -= ratio * b[k]
    x = [0.0] * n
    for k in range(n - 1, -1, -1):
        x[k] = (b[k] - sum(a[k][m] * x[m] for m in range(k + 1, n) if a[k][m])) / a[k][k]
    return x


def cost(p: Problem, lin: Linear, rows: Sequence[int]) -> float:
    data = sum(t**2 * log(1 + (lin.r[i] / p.cases[i].sd / t) ** 2) for i in rows for t in (tail(p.cases[i]),))
    return data + sum(((xk - m) / s) ** 2 for xk, m, s in zip(lin.x, p.prior, p.prior_sd, strict=True))


def fit(p: Problem, rounds: int = 8, start: list[float] | None = None, say: bool = False) -> Linear:
    """The best x with its derivatives."""
    rows = range(len(p.cases))
    lin = linearize(p, start or [0.0] * len(p.names))
    best = cost(p, lin, rows)
    for i in range(rounds):
        target = solve_step(p, lin, rows)
        scale, new = 1.0, lin
        while scale > 0.1:
            x = [a + scale * (t - a) for a, t in zip(lin.x, target, strict=True)]
            new = linearize(p, x, with_j=False)
            if cost(p, new, rows) < best:
                break
            scale /= 2
        got = cost(p, new, rows)
        if say:
            print(f"round {i}: cost {best:.1f} -> {got:.1f} at scale {scale}", flush=True)
        if got > best - 0.5:
            break
        lin, best = linearize(p, new.x), got
    return lin


def without(p: Problem, lin: Linear, out: set[int]) -> Calibration:
    """The calibration without the rows `out`; groups that only they speak of are left out of it."""
    rows = [i for i in range(len(p.cases)) if i not in out]
    x = solve_step(p, lin, rows)
    spoken = {g for i in rows for g in groups_of(p.cases[i])}
    kept = [v if n in PRIOR_SD or n in spoken else 0.0 for n, v in zip(p.names, x, strict=True)]
    c = p.calibration(kept)
    return Calibration(c.rates, {g: v for g, v in c.factors.items() if g in spoken}, {}, c.about).with_average(
        well_known(p.cases[i] for i in rows)
    )


def well_known(cases: Iterable[Case]) -> set[str]:
    """Engines on accelerators of which several values were measured."""
    counts = Counter(case.engine for case in cases if case.kind != "hybrid" and case.hardware in GPUS)
    return {engine for engine, n in counts.items() if n >= 3}


def error(case: Case, c: Calibration) -> float:
    """Relative error of a prediction: predicted / measured - 1."""
    return exp(residual(case, c)) - 1
