"""How fast a prompt's KV rows get to another process, beside a plain copy of the same bytes over the same path.

    python -m bench.kv_link [--tokens 4096] [--layers 12] [--row-bytes 1152] [--page 16] [--rounds 9]

The defaults are a prompt of 4,096 tokens of the 1.26 B checkpoint of the tables (bench.make_checkpoint): 12 layers of
512 + 64 numbers in bf16. The plain copy is one numpy copy out of the shared memory, and for TCP a loop of `sendall` and
`recv_into` over a loopback connection. Each round does the plain copy and the transfer in turn.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import numpy as np

from brigade.comm.kv.link import Fetches, Offers
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.rows import Bytes, Rows
from brigade.comm.kv.shared import SharedCaches, create
from brigade.comm.kv.tcp import Caller, KvServer

SECRET = b"of this bench alone, 32 bytes...."
PIECE = 1 << 20


def main() -> None:
    args = _arguments()
    n_pages = -(-args.tokens // args.page) + 8
    size = args.layers * n_pages * args.page * args.row_bytes
    file = create()
    os.ftruncate(file, size)
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.kv_link", *sys.argv[1:], "--give", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[file],
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        offer = msgspec.json.decode(child.stdout.readline(), type=Offer)
        port = int(child.stdout.readline())
        rows = Rows(np.zeros(size, np.uint8), args.layers, args.page, args.row_bytes)
        _print(args, rows, offer, file, port)
    finally:
        child.stdin.close()
        child.wait(10)


def _print(args: argparse.Namespace, rows: Rows, offer: Offer, file: int, port: int) -> None:
    n = args.layers * args.tokens * args.row_bytes
    mine = list(range(4, 4 + len(offer.pages)))
    caches = SharedCaches([file])
    source, plain = caches._map(0)[:n], np.zeros(n, np.uint8)
    check = lambda: [rows.check(layer, mine, 0, args.tokens) for layer in range(args.layers)]  # noqa: E731
    ways: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("shared", lambda: np.copyto(plain, source), _fetching(Fetches(rows, caches.open, 30), offer, mine)),
        ("tcp", lambda: _receive(port, plain), _fetching(Fetches(rows, Caller(SECRET).open, 30), offer, mine)),
    ]
    print(f"{n / 1e6:.1f} MB: {args.tokens} tokens x {args.layers} layers x {args.row_bytes} B, pages of {args.page}")
    print("| link | plain copy, ms | GB/s | transfer, ms | GB/s | transfer / plain | checksum, ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, copy, fetch in ways:
        times: list[tuple[float, float, float]] = []
        for _ in range(args.rounds + 1):
            times.append((_seconds(copy), _seconds(fetch), _seconds(check)))
        a, b, c = (statistics.median(t[i] for t in times[1:]) for i in range(3))  # the first touches fresh memory
        print(
            f"| {name} | {a * 1e3:.1f} | {n / a / 1e9:.2f} | {b * 1e3:.1f} | {n / b / 1e9:.2f} | {a / b:.2f} |"
            f" {c * 1e3:.1f} |",
            flush=True,
        )


def _fetching(fetches: Fetches, offer: Offer, pages: list[int]) -> Callable[[], None]:
    def fetch() -> None:
        fetches.fetch(1, offer, pages, 0)
        while not (ended := fetches.poll()):
            time.sleep(0.0002)
        if ended[0].failure:
            raise SystemExit(ended[0].failure)

    return fetch


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _receive(port: int, into: Bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        view = into.data
        while view:
            n = sock.recv_into(view)
            if not n:
                raise SystemExit("the plain copy ended early")
            view = view[n:]


def _give(args: argparse.Namespace) -> None:
    """The other process: fills the shared cache, offers it, and sends plain bytes to whoever connects."""
    memory = np.memmap(os.fdopen(args.give, "r+b"), np.uint8)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, np.uint8)
    rows = Rows(memory, args.layers, args.page, args.row_bytes)
    offers = Offers(rows, 0)
    offers.address = KvServer(offers, "127.0.0.1", SECRET, 30).address
    offers.offer(1, list(range(-(-args.tokens // args.page))), 0, args.tokens)
    while not (ready := offers.poll()):
        time.sleep(0.001)
    n = args.layers * args.tokens * args.row_bytes
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(msgspec.json.encode(ready[0]).decode())
        print(server.getsockname()[1], flush=True)
        server.settimeout(0.2)
        while not _ended():
            try:
                sock, _ = server.accept()
            except TimeoutError:
                continue
            with sock:
                sock.settimeout(30)
                for at in range(0, n, PIECE):
                    sock.sendall(memory[at : min(at + PIECE, n)].data)
    os._exit(0)


def _ended() -> bool:
    import select

    return bool(select.select([sys.stdin], [], [], 0)[0])


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--row-bytes", type=int, default=1152)
    p.add_argument("--page", type=int, default=16)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--give", type=int, default=-1, help=argparse.SUPPRESS)
    return p.parse_args()


if __name__ == "__main__":
    args = _arguments()
    if args.give >= 0:
        _give(args)
    else:
        main()
