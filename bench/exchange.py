"""What one dispatch and combine costs per layer, for each backend and wire, beside its bytes over what memory can copy.

    python -m bench.exchange [--ranks 2,3,4] [--tokens 1,32,256] [--width 1024] [--k 8] [--rate GBIT] [--compute US]

Each rank is a process with one thread. Experts compute nothing here: the results are there before they are asked for.
"hosts" has the ranks on two hosts of this machine, each with a segment of its own. --rate puts all into a network
namespace, whose one link carries so many Gbit/s for all ranks together; it needs unshare, ip and tc. --compute measures
layers instead in which experts compute for so long: as one micro-batch, and as two with half the tokens and time each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

BACKENDS = ("shared", "mesh", "hosts", "gloo")
WIRES = ("auto", "bf16", "int8", "fp8")
HOSTS = {2: [1, 1], 3: [2, 1], 4: [2, 2]}
SLOTS_PER_RANK = 16
DEADLINE = 30.0
SECONDS = 0.5
"""Of each measurement."""


def main() -> int:
    """The command line. Returns the exit status."""
    args = _arguments()
    if args.rate and not args.inside:
        return _on_slow_link(args.rate)
    if args.compute and min(args.tokens) < 2:
        args.tokens = [n for n in args.tokens if n > 1]
    lines = [line for n_ranks in args.ranks for line in _run(n_ranks, args)]
    print(_overlaps(lines) if args.compute else f"{_costs(lines, args)}\n\n{_bytes(lines)}", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(t) for t in text.split(",")]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=ints, default=[2, 3, 4])
    p.add_argument("--tokens", type=ints, default=[1, 32, 256])
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--k", type=int, default=8)
    p.add_argument("--backends", type=lambda text: text.split(","), default=list(BACKENDS))
    p.add_argument("--seconds", type=float, default=SECONDS)
    p.add_argument("--rate", type=float, default=0, help="Gbit/s of one link for all ranks; 0: this machine's loopback")
    p.add_argument("--compute", type=float, default=0, help="microseconds of a layer's experts on each rank")
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--rank", help=argparse.SUPPRESS)
    return p.parse_args()


def _on_slow_link(gbit: float) -> int:
    link = (
        f"ip link set lo up && tc qdisc add dev lo root tbf rate {round(1000 * gbit)}mbit burst 256kb latency 1s && "
        'exec "$@"'
    )
    inside = [sys.executable, "-m", "bench.exchange", *sys.argv[1:], "--inside"]
    return subprocess.run(["unshare", "-Urn", "sh", "-c", link, "sh", *inside], check=False).returncode


def _run(n_ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each number of tokens, backend and wire: the slowest rank's times, and all ranks' bytes."""
    from brigade.comm.meeting import listen
    from brigade.comm.segment import Segment

    with ExitStack() as held, tempfile.TemporaryDirectory() as directory:

        def segment(n: int, tokens: int) -> int:
            made = Segment.create(n, tokens, args.width, args.k)
            held.callback(made.close)
            return made.fd

        most, hosts = max(args.tokens), HOSTS[n_ranks]
        shared, of_host = segment(n_ranks, most), [segment(n, most * n_ranks) for n in hosts]
        socks = [listen("127.0.0.1") for _ in range(n_ranks)]
        setup = {
            **{"size": n_ranks, "fd": shared, "addresses": [s.getsockname() for s in socks], "hosts": hosts},
            **{"store": os.path.join(directory, "store")},
            **{name: getattr(args, name) for name in ("tokens", "width", "k", "seconds", "backends", "compute")},
        }
        ranks = []
        for rank, sock in enumerate(socks):
            host = 0 if rank < hosts[0] else 1
            place = {"rank": rank, "port": sock.fileno(), "host_fd": of_host[host], "local": rank - host * hosts[0]}
            command = [sys.executable, "-m", "bench.exchange", "--rank", json.dumps({**setup, **place})]
            files = (shared, of_host[host], sock.fileno())
            ranks.append(subprocess.Popen(command, pass_fds=files, stdout=subprocess.PIPE, text=True))
        for s in socks:
            s.close()
        said = [rank.communicate(timeout=400)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; see above")
    return [_together(n_ranks, every) for every in zip(*(json.loads(s) for s in said), strict=True)]


def _together(n_ranks: int, every: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    slowest = max(every, key=lambda e: e["median"])
    copied, bandwidth = sum(e["copied"] for e in every), sum(e["bandwidth"] for e in every)
    return {**slowest, "ranks": n_ranks, "limit": copied / bandwidth, "sent": max(e["sent"] for e in every)}


def _costs(lines: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Microseconds of the slowest rank, one row for each backend. The limit is that of auto: all bytes that ranks must
    copy, over what all of them copied together."""
    head = "| ranks | tokens of a rank | backend | auto, us | p10 | limit, us | limit / auto | bf16 | int8 | fp8 |"
    rows = [head, "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for of in _grouped(lines):
        exact = of["auto"]
        rounded = " | ".join(f"{1e6 * of[wire]['median']:.0f}" for wire in WIRES[1:])
        rows.append(
            f"| {exact['ranks']} | {exact['tokens']} | {exact['backend']} | {1e6 * exact['median']:.0f} "
            f"| {1e6 * exact['p10']:.0f} | {1e6 * exact['limit']:.0f} | {exact['limit'] / exact['median']:.0%} "
            f"| {rounded} |"
        )
    return "\n".join(rows)


def _bytes(lines: list[dict[str, Any]]) -> str:
    """What a rank sends over the mesh, and the bandwidth below which a wire that rounds is faster than auto: on a link,
    bytes over its bandwidth come on top of the time measured here."""
    rows = ["| ranks | tokens of a rank | auto, kB | bf16 | int8, fp8 | bf16 pays below, Gbit/s | int8 | fp8 |"]
    rows.append("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for of in _grouped(lines):
        if of["auto"]["backend"] != "mesh":
            continue
        sent = " | ".join(f"{of[wire]['sent'] / 1e3:.1f}" for wire in WIRES[:3])
        pays = " | ".join(_pays_below(of["auto"], of[wire]) for wire in WIRES[1:])
        rows.append(f"| {of['auto']['ranks']} | {of['auto']['tokens']} | {sent} | {pays} |")
    return "\n".join(rows)


def _overlaps(lines: list[dict[str, Any]]) -> str:
    rows = ["| ranks | tokens of a rank | backend | experts, us | one micro-batch, us | two, us | two / one |"]
    rows.append("|--:|--:|---|--:|--:|--:|--:|")
    for e in lines:
        rows.append(
            f"| {e['ranks']} | {e['tokens']} | {e['backend']} | {e['compute']:.0f} | {1e6 * e['one']:.0f} "
            f"| {1e6 * e['median']:.0f} | {e['median'] / e['one']:.2f} |"
        )
    return "\n".join(rows)


def _pays_below(exact: dict[str, Any], rounded: dict[str, Any]) -> str:
    later = rounded["median"] - exact["median"]
    return "any" if later <= 0 else f"{8e-9 * (exact['sent'] - rounded['sent']) / later:.1f}"


def _grouped(lines: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Lines that differ in nothing but the wire, by wire."""
    out: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in lines:
        out.setdefault((line["ranks"], line["tokens"], line["backend"]), {})[line["wire"]] = line
    return list(out.values())


def _rank(setup: dict[str, Any]) -> None:
    """One rank: measures everything in the same order as its peers and prints what it saw."""
    import torch

    torch.set_num_threads(1)
    rank, size, width, k = (setup[n] for n in ("rank", "size", "width", "k"))
    bounds = [SLOTS_PER_RANK * r for r in range(size + 1)]
    shared, make = _exchanges(setup, bounds)
    ways = {name: _wire(name, width) for name in (WIRES[:1] if setup["compute"] else WIRES)}
    exchanges = {(b, name): make(b, way) for b in setup["backends"] for name, way in ways.items()}
    out = []
    for n_tokens in setup["tokens"]:
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(n_tokens, width, generator=generator).bfloat16()
        chosen = [torch.randperm(bounds[-1], generator=generator)[:k] for _ in range(n_tokens)]
        slots_TK = torch.stack(chosen).int()
        bandwidth = _bandwidth(shared)
        for (backend, name), exchange in exchanges.items():
            way = ways[name]
            if setup["compute"]:
                out.append({"backend": backend, "tokens": n_tokens, "bandwidth": bandwidth, "copied": 0, "sent": 0})
                out[-1] |= _cut(exchange, x_TD, slots_TK, shared, setup)
                continue
            exchange.start_dispatch(0, x_TD, slots_TK)
            rows_ND, _ = exchange.finish_dispatch(0)
            y_ND = rows_ND.float()
            exchange.start_combine(0, y_ND)
            exchange.finish_combine(0)

            def once(exchange: Any = exchange, y_ND: Any = y_ND, x_TD: Any = x_TD, slots_TK: Any = slots_TK) -> None:
                exchange.start_dispatch(0, x_TD, slots_TK)
                exchange.finish_dispatch(0)
                exchange.start_combine(0, y_ND)
                exchange.finish_combine(0)

            times = _times(once, shared, setup["seconds"])
            home = slots_TK // SLOTS_PER_RANK
            n_rows = sum(int((home == r).any(1).sum()) for r in range(size) if r != rank)
            n_own = int((home == rank).sum())
            result_bytes = width * way.results.itemsize
            n_here = len(rows_ND)
            out.append(
                {
                    **{"backend": backend, "wire": name, "tokens": n_tokens, "bandwidth": bandwidth},
                    **{"median": statistics.median(times), "p10": sorted(times)[len(times) // 10]},
                    # rows and results that leave this rank, each row once for a rank that computes any of its experts
                    "sent": n_rows * way.row_bytes + (n_here - n_own) * result_bytes,
                    # x into the segment, rows out of it, results into it, results out of it
                    "copied": (n_tokens + n_here) * way.row_bytes + (n_here + n_tokens * k) * result_bytes,
                }
            )
    shared.share([])  # who ends first would seem lost to the others
    print(json.dumps(out))


def _cut(exchange: Any, x_TD: Any, slots_TK: Any, group: Any, setup: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a layer in one micro-batch and in two, in the order of calls of model/overlap.py."""
    from brigade.model.overlap import in_turn

    def layer(lane: int, first: int, last: int, us: float) -> Any:
        exchange.start_dispatch(lane, x_TD[first:last], slots_TK[first:last])
        yield
        rows_ND, _ = exchange.finish_dispatch(lane)
        y_ND = rows_ND.float()
        until = time.perf_counter() + us / 1e6
        while time.perf_counter() < until:
            pass
        exchange.start_combine(lane, y_ND)
        yield
        exchange.finish_combine(lane)

    n, us = len(x_TD), setup["compute"]
    one = _times(lambda: in_turn([layer(0, 0, n, us)]), group, setup["seconds"])
    two = _times(lambda: in_turn([layer(0, 0, n // 2, us / 2), layer(1, n // 2, n, us / 2)]), group, setup["seconds"])
    return {"compute": us, "one": statistics.median(one), "median": statistics.median(two)}


def _wire(name: Any, width: int) -> Any:
    """With the C++ codec where there is one."""
    import torch

    from brigade.comm.wire import wire
    from brigade.engine.machine import read_cpu
    from brigade.kernels.cpu.build import Built, find_library
    from brigade.kernels.cpu.layers import Kernels
    from brigade.kernels.cpu.wire import TileCodec

    codec = None
    if name in ("int8", "fp8") and isinstance(library := find_library(read_cpu().features), Built):
        codec = TileCodec(Kernels(library.path, 1), name)
    return wire(name, width, torch.bfloat16, codec)


def _exchanges(setup: dict[str, Any], bounds: list[int]) -> tuple[Any, Callable[[str, Any], Any]]:
    """The group of all ranks, and how an exchange of a backend is made."""
    import socket

    from torch.distributed import FileStore

    from brigade.comm.distributed import DistributedExchange, DistributedGroup
    from brigade.comm.hierarchical import HierarchicalExchange
    from brigade.comm.mesh import Mesh
    from brigade.comm.remote import MeshExchange
    from brigade.comm.segment import Segment
    from brigade.comm.shared import SharedExchange, SharedGroup

    rank, size, k = setup["rank"], setup["size"], setup["k"]
    shared = SharedGroup(Segment.attach(setup["fd"]), rank, deadline=DEADLINE)
    shared.form(1)
    of_host = SharedGroup(Segment.attach(setup["host_fd"]), setup["local"], deadline=DEADLINE / 2)
    of_host.form(1)
    gloo = DistributedGroup(FileStore(setup["store"], -1), "bench", rank, size, deadline=DEADLINE)
    addresses = [tuple(a) for a in setup["addresses"]]
    about = {"secret": b"of a benchmark..", "layout": bytes(32), "generation": 1, "deadline": DEADLINE}
    mesh = Mesh(rank, addresses, socket.socket(fileno=setup["port"]), **about)

    def make(backend: str, way: Any) -> Any:
        match backend:
            case "shared":
                return SharedExchange(shared, bounds, way)
            case "mesh":
                return MeshExchange(mesh, bounds, k, way)
            case "hosts":
                return HierarchicalExchange(mesh, of_host, setup["hosts"], bounds, way)
            case "gloo":
                return DistributedExchange(gloo, bounds, k, way)
        raise ValueError(f"backends: {', '.join(BACKENDS)}, not {backend}")

    return shared, make


def _times(once: Callable[[], None], group: Any, seconds: float) -> list[float]:
    """Seconds of each call, all ranks together, as many as fit."""
    start = time.perf_counter()
    for _ in range(5):
        once()
    took = max(ns for (ns,) in group.share([int(1e9 * (time.perf_counter() - start) / 5)])) / 1e9
    n = max(20, min(20_000, int(seconds / took)))
    times = []
    for _ in range(n):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return times


def _bandwidth(group: Any) -> float:
    """Bytes a second that this rank copies while all the others copy, too: 16 MB, more than a core's own cache."""
    import numpy as np

    data, into = np.ones(16 << 20, np.uint8), np.ones(16 << 20, np.uint8)
    group.share([])
    start = time.perf_counter()
    for _ in range(8):
        np.copyto(into, data)
    return 8 * data.size / (time.perf_counter() - start)


if __name__ == "__main__":
    arguments = _arguments()
    if arguments.rank:
        _rank(json.loads(arguments.rank))
    else:
        sys.exit(main())
