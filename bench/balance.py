"""How even the placement of experts makes the ranks' loads, on measured loads, and how long it takes.

    python -m bench.balance loads/*.npz loads/*.json loads/*.jsonl
    python -m bench.balance                                            # only the times

Files of loads, by their ending:
    .npz     counts [workload][layer][expert], names [workload]
    .json    {"counts": [expert]}: one layer
    .jsonl   a line {"type": "meta", "num_experts": E}, then one for each token and layer:
             {"type": "route", "layer": l, "topk_ids": [...], "topk_weights": [...]}; its halves are two workloads

Loads are over the mean rank's: 1.00 is a perfect split. The ratio of a workload is the sum of its layers' busiest ranks
over the sum of their means, since ranks wait for each other in every layer; a line is the mean over a file's workloads.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brigade.core.moves import moves, settle, where_it_pays
from brigade.core.placement import Loads, Placement, initial, place, rank_loads, replicas_for

COLUMNS = (
    "loads",
    "workloads",
    "ranks",
    "redundant",
    "before",
    "on itself",
    "floor",
    "on the others",
    "perfect / busiest",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- |{' --: |' * (len(COLUMNS) - 1)}"


class BadLoads(ValueError):
    """A file of loads that cannot be used. The message names it and the field."""


@dataclass(frozen=True)
class Workload:
    name: str
    load_LE: list[list[float]]


@dataclass(frozen=True)
class Line:
    """Busiest over mean rank, for one file, number of ranks and number of spare slots."""

    n_workloads: int
    n_ranks: int
    n_redundant: int
    before: float
    """Placed without knowing any load."""
    itself: float
    """Placed by the loads that it is then measured on: what balancing could do if it knew the future."""
    floor: float
    """What no placement gets below, because an expert's replica is on one rank."""
    others: float | None
    """Placed by the sum of the file's other workloads. None with one workload."""


def read(path: Path) -> list[Workload]:
    """The workloads of a file. Raises BadLoads and OSError."""
    reader = {".npz": _read_npz, ".json": _read_json, ".jsonl": _read_routes}.get(path.suffix)
    if reader is None:
        raise BadLoads(f"{path}: loads are read from .npz, .json and .jsonl")
    try:
        return reader(path)
    except KeyError as e:
        raise BadLoads(f"{path}: {e.args[0]} is missing") from e
    except (ValueError, IndexError, TypeError) as e:
        raise BadLoads(f"{path}: {e}") from e


def measure(workloads: Sequence[Workload], n_ranks: int, n_redundant: int) -> Line:
    """One line of the table."""
    n_layers, n_experts = len(workloads[0].load_LE), len(workloads[0].load_LE[0])
    n_slots = n_experts + n_redundant
    start = initial(n_layers, n_experts, n_slots=n_slots, n_ranks=n_ranks)

    def placed(load_LE: Loads) -> Placement:
        return place(load_LE, n_slots=n_slots, n_groups=1, n_nodes=1, n_ranks=n_ranks)

    total = np.sum([w.load_LE for w in workloads], axis=0)
    before, itself, floors, others = [], [], [], []
    for workload in workloads:
        load = workload.load_LE
        best = placed(load)
        before.append(ratio(load, start))
        itself.append(ratio(load, best))
        floors.append(floor(load, n_slots, n_ranks))
        if len(workloads) > 1:
            others.append(ratio(load, placed((total - np.asarray(load)).tolist())))
    means = [statistics.fmean(x) if x else None for x in (before, itself, floors, others)]
    return Line(len(workloads), n_ranks, n_redundant, *means)  # type: ignore[arg-type]


def ratio(load_LE: Loads, placement: Placement) -> float:
    """The busiest ranks of all layers over the mean ones."""
    per_layer = rank_loads(load_LE, placement)
    return sum(map(max, per_layer)) / sum(map(statistics.fmean, per_layer))


def floor(load_LE: Loads, n_slots: int, n_ranks: int) -> float:
    """The least that `ratio` can be: no layer's busiest rank is below the mean, nor below its heaviest replica."""
    busiest = mean = 0.0
    for load in load_LE:
        of_layer = sum(load) / n_ranks
        mean += of_layer
        busiest += max(of_layer, _heaviest_replica(load, n_slots))
    return busiest / mean


def line_of(name: str, line: Line) -> str:
    """A row of the table in Markdown."""
    others = "-" if line.others is None else f"{line.others:.2f}"
    counts = f"{line.n_workloads} | {line.n_ranks} | {line.n_redundant}"
    ratios = f"{line.before:.2f} | {line.itself:.2f} | {line.floor:.2f} | {others}"
    return f"| {name} | {counts} | {ratios} | {100 / line.itself:.0f} % |"


def times(rounds: int) -> list[str]:
    """How long the placement of a DeepSeek-V3 decode unit takes, and what comes with it; best and median."""
    rng = random.Random(1)
    sizes = {"n_slots": 288, "n_groups": 8, "n_nodes": 18, "n_ranks": 144}
    then = [[rng.paretovariate(1.5) for _ in range(256)] for _ in range(58)]
    now = [[x * rng.uniform(0.8, 1.25) for x in layer] for layer in then]
    old, new = place(then, **sizes), place(now, **sizes)
    settled = settle(old, new)
    paying = where_it_pays(old, settled, now)
    return [
        "58 layers x 256 experts (+ 32) on 144 ranks, made-up loads that change by up to a quarter:",
        _timed("place over all ranks", rounds, lambda: place(now, **sizes)),
        _timed("place by node, 128 ranks on 4", rounds, lambda: place(now, **sizes | {"n_nodes": 4, "n_ranks": 128})),
        _timed("settle", rounds, lambda: settle(old, new)),
        _timed("replica table of one rank, one layer", rounds, lambda: replicas_for(settled, 0, 0)),
        f"moves: {len(moves(old, new))} as placed, {len(moves(old, settled))} settled, "
        f"{len(moves(old, paying))} where it pays, of {58 * 288} slots",
    ]


def _timed(what: str, rounds: int, work: Callable[[], object]) -> str:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        took.append((time.perf_counter() - start) * 1e3)
    return f"{what}: {min(took):.1f} ms (median {statistics.median(took):.1f} of {rounds})"


def _heaviest_replica(load: Sequence[float], n_slots: int) -> float:
    """The least load that the heaviest replica can have in this many slots, by bisection."""
    low, high = 0.0, max(load)
    for _ in range(60):
        middle = (low + high) / 2
        fits = middle > 0 and sum(max(1, -(-x // middle)) for x in load) <= n_slots
        low, high = (low, middle) if fits else (middle, high)
    return high


def _read_npz(path: Path) -> list[Workload]:
    with np.load(path, allow_pickle=False) as file:
        counts, names = file["counts"], file["names"]
    if counts.ndim != 3 or len(counts) != len(names):
        raise BadLoads(f"counts must be [workload][layer][expert] with a name each, not {counts.shape}")
    return [Workload(str(name), _checked(c.tolist())) for name, c in zip(names, counts, strict=True)]


def _read_json(path: Path) -> list[Workload]:
    return [Workload(path.stem, _checked([json.loads(path.read_text())["counts"]]))]


def _read_routes(path: Path) -> list[Workload]:
    records = [json.loads(text) for text in path.read_text().splitlines() if text.strip()]
    n_experts = next((r["num_experts"] for r in records if r["type"] == "meta"), None)
    if n_experts is None:
        raise BadLoads("there is no line of type meta with num_experts")
    # Equal weights for all: the router was given zeros, as engines do to warm up.
    routes = [r for r in records if r["type"] == "route" and len(set(r["topk_weights"])) > 1]
    layers = sorted({r["layer"] for r in routes})
    middle = len(routes) // 2
    halves = {"first half": routes[:middle], "second half": routes[middle:]}
    result = []
    for name, half in halves.items():
        counts = {layer: [0.0] * n_experts for layer in layers}
        for route in half:
            for expert in route["topk_ids"]:
                counts[route["layer"]][expert] += 1
        result.append(Workload(name, _checked([counts[layer] for layer in layers])))
    return result


def _checked(load_LE: list[list[float]]) -> list[list[float]]:
    if not load_LE or not load_LE[0] or any(min(load) < 0 or sum(load) <= 0 for load in load_LE):
        raise BadLoads("every layer needs counts that are not negative, and one that is not zero")
    return load_LE


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.balance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of loads; none: only the times")
    parser.add_argument("--ranks", type=_numbers, default=[8, 32, 144], help="default: 8,32,144")
    parser.add_argument("--redundant", type=_numbers, default=[0, 32], help="spare slots; default: 0,32")
    parser.add_argument("--rounds", type=int, default=20, help="of each time; default: %(default)s")
    options = parser.parse_args(argv)
    try:
        files = {path.stem: read(path) for path in options.files}
    except (BadLoads, OSError) as e:
        print(f"bench.balance: {e}", file=sys.stderr)
        return 2
    if files:
        print(HEAD)
    for name, workloads in files.items():
        for n_ranks in options.ranks:
            for n_redundant in options.redundant:
                print(line_of(name, measure(workloads, n_ranks, n_redundant)), flush=True)
    print(f"\nPython {platform.python_version()} on {platform.machine()}")
    print("\n".join(times(options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
