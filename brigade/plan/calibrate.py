"""Fits the planner to published measurements and writes data/calibration.json with every residual.

    python -m brigade.plan.calibrate            fit, leave sources out, write
    python -m brigade.plan.calibrate --check    fit again and compare with the committed file

Runs on the standard library; takes minutes. What is held out, and what the prediction may still know:

    workload    one engine x hardware x workload (all its rows): knows the engine on that hardware
    source      one source: knows whatever other sources say of its engine; and, as "source + factor", one factor
                from the source's other points
    hardware    an engine on one hardware: knows the engine
    engine      an engine: knows physics only
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

from brigade.plan.case import Case
from brigade.plan.fit import Linear, Problem, fit, groups_of, problem, residual, well_known, without
from brigade.plan.points import shipped_points, shipped_rows
from brigade.plan.rates import Calibration, to_json

OUT = Path(__file__).parent / "data" / "calibration.json"
COVER = 0.8
SAME = 0.01
"""Difference that --check lets pass, of a number below 1, or as a share of a larger one."""
Key = Callable[[Case], object]

HOLD_OUT: Mapping[str, Key] = {
    "workload": lambda c: (c.engine, c.hardware, c.kind, c.workload),
    "source": lambda c: c.source if not c.kind.startswith("row") else (c.engine, c.hardware, c.source),
    "hardware": lambda c: (c.engine, c.hardware),
    "engine": lambda c: c.engine,
}


def cases() -> list[Case]:
    return shipped_points() + shipped_rows()


def held_out(p: Problem, lin: Linear, key: Key) -> list[float]:
    """Residual of each case when predicted without all cases of its key."""
    folds: dict[object, set[int]] = {}
    for i, case in enumerate(p.cases):
        folds.setdefault(key(case), set()).add(i)
    out = [0.0] * len(p.cases)
    for members in folds.values():
        c = without(p, lin, members)
        for i in members:
            out[i] = residual(p.cases[i], c)
    return out


def with_factor(p: Problem, residuals: list[float]) -> list[float]:
    """Residuals after one factor per source and phase, from the source's other points (none where it is alone)."""
    out = []
    for i, case in enumerate(p.cases):
        same = [
            residuals[j]
            for j, other in enumerate(p.cases)
            if j != i and is_graded(other) and _origin(other) == _origin(case)
        ]
        out.append(residuals[i] - (shrunk(same) if same else 0.0))
    return out


def _origin(case: Case) -> tuple[str, str, str]:
    return case.source, case.phase, case.kind


def shrunk(values: list[float], prior: float = 0.3, noise: float = 0.08) -> float:
    """Mean pulled to 0 by a prior of that standard deviation."""
    n = len(values)
    return fmean(values) * prior**2 * n / (prior**2 * n + noise**2)


def quantile(values: Iterable[float], q: float) -> float:
    """Linear between order statistics, with the small-sample correction of conformal intervals, (n + 1) q."""
    ordered = sorted(values)
    at = min(len(ordered) - 1.0, max(0.0, (len(ordered) + 1) * q - 1))
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


SPREAD_PHASES = {"prefill": "prefill", "decode": "decode", "tpot": "decode", "mixed": "decode", "ttft": "ttft"}
KNOWN = {"engine+hardware": "workload", "engine": "hardware", "nothing": "engine"}


def spreads(p: Problem, held: Mapping[str, list[float]]) -> dict[str, float]:
    """80 % half widths by phase and by what is known; knowing less never narrows one."""
    out = {}
    for phase in ("prefill", "decode", "ttft"):
        width = 0.0
        for known, how in KNOWN.items():
            r = [abs(held[how][i]) for i, c in enumerate(p.cases) if SPREAD_PHASES[c.phase] == phase and is_graded(c)]
            width = max(width, quantile(r, COVER))
            out[f"{phase}/{known}"] = round(width, 4)
    return out


def coverage(p: Problem, held: Mapping[str, list[float]]) -> dict[str, float]:
    """Share of held-out points inside an interval made from the other sources' held-out residuals."""
    out = {}
    for known, how in KNOWN.items():
        key, inside, n = HOLD_OUT[how], 0, 0
        for phase in ("prefill", "decode", "ttft"):
            mine = [
                (key(c), abs(held[how][i]))
                for i, c in enumerate(p.cases)
                if SPREAD_PHASES[c.phase] == phase and is_graded(c)
            ]
            for k in {k for k, _ in mine}:
                others = [r for other, r in mine if other != k]
                if not others:
                    continue
                width = quantile(others, COVER)
                own = [r for other, r in mine if other == k]
                inside += sum(r <= width for r in own)
                n += len(own)
        out[known] = round(inside / n, 3)
    return out


def is_graded(case: Case) -> bool:
    """Headlines that lack most of their inputs do not shape intervals."""
    return case.sd < 0.2 or case.phase == "ttft"


def summary(p: Problem, full: list[float], held: Mapping[str, list[float]]) -> dict[str, Any]:
    """The table of targets."""

    def mean_error(r: list[float], want: Callable[[Case], bool]) -> float:
        return round(fmean(abs(exp(r[i]) - 1) for i, c in enumerate(p.cases) if want(c)), 4)

    def median_error(r: list[float], want: Callable[[Case], bool]) -> float:
        return round(median(abs(exp(r[i]) - 1) for i, c in enumerate(p.cases) if want(c)), 4)

    wide: dict[str, Callable[[Case], bool]] = {
        phase: lambda c, phase=phase: c.phase == phase and is_wide(c)  # type: ignore[misc]
        for phase in ("prefill", "decode")
    }
    is_row: Callable[[Case], bool] = lambda c: c.kind == "row" and c.phase == "tpot"  # noqa: E731
    is_ttft: Callable[[Case], bool] = lambda c: c.kind.startswith("row") and c.phase == "ttft"  # noqa: E731
    factored = with_factor(p, held["source"])
    engine_factored = with_factor(p, held["engine"])
    return {
        "points": len(p.cases),
        **{
            f"wide-EP {phase}": {
                "n": sum(map(want, p.cases)),
                "fitted": mean_error(full, want),
                "source held out": mean_error(held["source"], want),
                "source held out, one factor from its other points": mean_error(factored, want),
                "engine held out": mean_error(held["engine"], want),
                "engine held out, one factor from the source's other points": mean_error(engine_factored, want),
            }
            for phase, want in wide.items()
        },
        "TPOT, aggregated rows": {
            "n": sum(map(is_row, p.cases)),
            "fitted": mean_error(full, is_row),
            "workload held out": mean_error(held["workload"], is_row),
            "hardware held out": mean_error(held["hardware"], is_row),
        },
        "TTFT, all rows, median": {
            "n": sum(map(is_ttft, p.cases)),
            "fitted": median_error(full, is_ttft),
            "workload held out": median_error(held["workload"], is_ttft),
        },
        "80 % interval covers": coverage(p, held),
    }


def is_wide(case: Case) -> bool:
    """An expert-parallel unit of more than one node or supernode, with what the prediction needs stated (A or B)."""
    return case.sd < 0.2 and (case.kind == "wide" or case.engine == "cloudmatrix")


def calibrate(say: bool = True) -> dict[str, Any]:
    """The whole output file."""
    p = problem(cases())
    lin = fit(p, 10, say=say)
    held = {}
    for how, key in HOLD_OUT.items():
        held[how] = held_out(p, lin, key)
        if say:
            print(f"held out by {how}", flush=True)
    c = replace(p.calibration([round(v, 5) for v in lin.x]).with_average(well_known(p.cases)), spread=spreads(p, held))
    about = "written by python -m brigade.plan.calibrate; logarithms of predicted / measured; do not edit"
    out = to_json(replace(c, about=about))
    out["summary"] = summary(p, lin.r, held)
    out["residuals"] = [
        {
            "case": case.name,
            "metric": case.metric,
            "measured": case.measured,
            "fitted": round(lin.r[i], 3),
            **{how: round(r[i], 3) for how, r in held.items()},
        }
        for i, case in enumerate(p.cases)
    ]
    return out


def folded(base: Calibration, own: list[Case]) -> Calibration:
    """A user's own measurements on top of a calibration: rates stay, factors of the groups they speak of move.

    Each factor's posterior under the levels' priors, by the same least squares; groups without measurements stay.
    """
    groups = sorted({g for case in own for g in groups_of(case)})
    p = problem(own)
    names = [n for n in p.names if n in groups]
    sds = [s for n, s in zip(p.names, p.prior_sd, strict=True) if n in groups]
    start = [base.factors.get(n, 0.0) for n in names]

    class Own(Problem):
        def calibration(self, x: Any) -> Calibration:
            return replace(base, factors={**base.factors, **dict(zip(self.names, x, strict=True))})

    q = Own(own, names, sds, start)
    lin = fit(q, 6, start=list(start))
    return replace(q.calibration(lin.x), about=f"{base.about}; with {len(own)} own measurements")


def dump(data: Mapping[str, Any]) -> str:
    residuals = ",\n".join("  " + json.dumps(r) for r in data["residuals"])
    head = json.dumps({k: v for k, v in data.items() if k != "residuals"}, indent=1)
    return head[:-2] + ',\n "residuals": [\n' + residuals + "\n ]\n}\n"


def far_from(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two outputs differ by more than rounding does on another machine: paths like 'residuals.3.source'."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [k for k in (*old, *new) if k not in old or k not in new]
        inner = [far_from(old[k], new[k], f"{path}.{k}".strip(".")) for k in old if k in new]
        return [f"{path}.{k}".strip(".") for k in keys] + [x for one in inner for x in one]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [x for i, (a, b) in pairs for x in far_from(a, b, f"{path}.{i}".strip("."))]
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        return [] if abs(new - old) <= SAME * max(1.0, abs(old)) else [path]
    return [] if old == new else [path]


def main() -> int:
    """The command line. Returns the exit status: 1 where --check finds another result."""
    parser = argparse.ArgumentParser(prog="brigade.plan.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file instead of writing it")
    options = parser.parse_args()
    data = calibrate()
    print(json.dumps(data["summary"], indent=1))
    if not options.check:
        OUT.write_text(dump(data), encoding="utf-8")
        return 0
    old = json.loads(OUT.read_text(encoding="utf-8"))
    far = far_from(old, data)
    print("same as committed" if not far else f"differs from the committed file in {', '.join(far[:20])}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
