"""What one dispatch and combine costs per layer, for each backend, beside its bytes over what memory can copy.

    python -m bench.exchange [--ranks 2,4] [--tokens 1,32,256] [--width 1024] [--k 8]

Each rank is a process with one thread. Experts compute nothing here: the results are there before they are asked for.
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
from typing import Any

BACKENDS = ("shared", "mesh", "gloo")
SLOTS_PER_RANK = 16
DEADLINE = 30.0
SECONDS = 1.2
"""Of each measurement."""


def main() -> None:
    args = _arguments()
    print("| ranks | tokens of a rank | backend | us, median | us, p10 | limit, us | limit / median |")
    print("|--:|--:|---|--:|--:|--:|--:|")
    for n_ranks in args.ranks:
        for line in _run(n_ranks, args):
            print(line, flush=True)


def _arguments() -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(t) for t in text.split(",")]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=ints, default=[2, 4])
    p.add_argument("--tokens", type=ints, default=[1, 32, 256])
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--k", type=int, default=8)
    p.add_argument("--seconds", type=float, default=SECONDS)
    p.add_argument("--rank", help=argparse.SUPPRESS)
    return p.parse_args()


def _run(n_ranks: int, args: argparse.Namespace) -> list[str]:
    from brigade.comm.meeting import listen
    from brigade.comm.segment import Segment

    segment = Segment.create(n_ranks, max(args.tokens), args.width, args.k)
    socks = [listen("127.0.0.1") for _ in range(n_ranks)]
    addresses = [s.getsockname() for s in socks]
    with tempfile.TemporaryDirectory() as directory:
        setup = {
            "size": n_ranks,
            "fd": segment.fd,
            "addresses": addresses,
            "store": os.path.join(directory, "store"),
            **{k: getattr(args, k) for k in ("tokens", "width", "k", "seconds")},
        }
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "bench.exchange",
                    "--rank",
                    json.dumps({**setup, "rank": r, "port": s.fileno()}),
                ],
                pass_fds=(segment.fd, s.fileno()),
                stdout=subprocess.PIPE,
                text=True,
            )
            for r, s in enumerate(socks)
        ]
        for s in socks:
            s.close()
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    segment.close()
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; see above")
    return [_line(n_ranks, every) for every in zip(*(json.loads(s) for s in said), strict=True)]


def _line(n_ranks: int, every: tuple[dict[str, Any], ...]) -> str:
    """Of the slowest rank. The limit: all bytes that ranks must copy, over what all of them copied together."""
    slowest = max(every, key=lambda e: e["median"])
    limit = 1e6 * sum(e["bytes"] for e in every) / sum(e["bandwidth"] for e in every)
    return (
        f"| {n_ranks} | {slowest['tokens']} | {slowest['backend']} | {1e6 * slowest['median']:.0f} "
        f"| {1e6 * slowest['p10']:.0f} | {limit:.0f} | {limit / (1e6 * slowest['median']):.0%} |"
    )


def _rank(setup: dict[str, Any]) -> None:
    """One rank: measures all backends in the same order as its peers and prints what it saw."""
    import socket

    import torch
    from torch.distributed import FileStore

    from brigade.comm.distributed import DistributedExchange, DistributedGroup
    from brigade.comm.mesh import Mesh
    from brigade.comm.remote import MeshExchange
    from brigade.comm.segment import Segment
    from brigade.comm.shared import SharedExchange, SharedGroup

    torch.set_num_threads(1)
    rank, size, width, k = (setup[n] for n in ("rank", "size", "width", "k"))
    shared = SharedGroup(Segment.attach(setup["fd"]), rank, deadline=DEADLINE)
    shared.form(1)
    gloo = DistributedGroup(FileStore(setup["store"], -1), "bench", rank, size, deadline=DEADLINE)
    port = socket.socket(fileno=setup["port"])
    addresses = [tuple(a) for a in setup["addresses"]]
    about = {"secret": b"of a benchmark..", "layout": bytes(32), "generation": 1, "deadline": DEADLINE}
    mesh = Mesh(rank, addresses, port, **about)
    bounds = [SLOTS_PER_RANK * r for r in range(size + 1)]
    exchanges = {
        "shared": SharedExchange(shared, bounds, torch.bfloat16),
        "mesh": MeshExchange(mesh, bounds, width, k, torch.bfloat16),
        "gloo": DistributedExchange(gloo, bounds, width, k, torch.bfloat16),
    }
    out = []
    for n_tokens in setup["tokens"]:
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(n_tokens, width, generator=generator).bfloat16()
        chosen = [torch.randperm(bounds[-1], generator=generator)[:k] for _ in range(n_tokens)]
        slots_TK = torch.stack(chosen).int()
        for name in BACKENDS:
            exchange = exchanges[name]
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
            out.append(
                {
                    "backend": name,
                    "tokens": n_tokens,
                    "median": statistics.median(times),
                    "p10": sorted(times)[len(times) // 10],
                    # x into the segment, rows out of it, results into it, results out of it
                    "bytes": width * (2 * n_tokens + (2 + 4) * rows_ND.shape[0] + 4 * n_tokens * k),
                    "bandwidth": _bandwidth(shared),
                }
            )
    print(json.dumps(out))


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
        main()
