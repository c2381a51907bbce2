"""How fast a prompt's KV rows get to another process, beside a plain copy of the same bytes over the same path.

    python -m bench.kv_link [--tokens 4096] [--layers 12] [--row-bytes 1152] [--page 16] [--rounds 9]

The defaults are a prompt of 4,096 tokens of the 1.26 B checkpoint of the tables (bench.make_checkpoint): 12 layers of
512 + 64 numbers in bf16. All rows are finished at one moment, when the transfer follows the offer already, as it does
while a prompt is computed; the time is from there to the last checksum. The plain copy is one numpy copy out of the
shared memory, and for TCP and NIXL (if it is installed) a loop of `sendall` and `recv_into` over a loopback connection
that is there already. UCX_TLS=tcp keeps NIXL from reading the other process's memory, as it does on one host. Each
round does the plain copy and the transfer in turn.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from brigade.comm.kv.link import Fetches
from brigade.comm.kv.nixl import Nixl, installed
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.offers import Offers
from brigade.comm.kv.rows import Bytes, Fast, Rows, checksum
from brigade.comm.kv.shared import SharedCaches, create
from brigade.comm.kv.tcp import Caller, KvServer
from brigade.engine.machine import read_cpu
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.checked import CheckedCopy
from brigade.kernels.cpu.structs import open_library

SECRET = b"of this bench alone, 32 bytes...."
PIECE = 1 << 20


class Giver:
    """The other process, which has the rows."""

    def __init__(self, file: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.kv_link", *sys.argv[1:], "--give", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[file],
        )
        self.n = 0
        self.port = int(self.hear())

    def offer(self) -> Offer:
        """One of which nothing is finished yet."""
        self.n += 1
        self.say(f"offer {self.n}")
        return msgspec.json.decode(self.hear(), type=Offer)

    def say(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what.encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> bytes:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def main() -> None:
    args = _arguments()
    n_pages = -(-args.tokens // args.page) + 8
    size = args.layers * n_pages * args.page * args.row_bytes
    file = create()
    os.ftruncate(file, size)
    giver = Giver(file)
    try:
        _print(args, Rows(np.zeros(size, np.uint8), args.layers, args.page, args.row_bytes), giver, file)
    finally:
        giver.close()


def _print(args: argparse.Namespace, rows: Rows, giver: Giver, file: int) -> None:
    n = args.layers * args.tokens * args.row_bytes
    mine = list(range(4, 4 - (-args.tokens // args.page)))
    caller = Caller(SECRET)
    fast = _fast()
    caches = SharedCaches([file], caller, fast)
    source, plain = caches.map(0)[:n], np.zeros(n, np.uint8)
    ways: list[tuple[str, Callable[[], float], Fetches]] = [
        ("shared", lambda: _seconds(lambda: np.copyto(plain, source)), Fetches(rows, caches.open, 30)),
        (
            "shared, no C++",
            lambda: _seconds(lambda: np.copyto(plain, source)),
            Fetches(rows, SharedCaches([file], caller).open, 30),
        ),
        ("tcp", lambda: _receive(giver.port, plain), Fetches(rows, caller.open, 30)),
    ]
    if installed():
        ways.append(("nixl", lambda: _receive(giver.port, plain), Fetches(rows, Nixl.start(caller, fast).open, 30)))
    print(f"{n / 1e6:.1f} MB: {args.tokens} tokens x {args.layers} layers x {args.row_bytes} B, pages of {args.page}")
    print("| link | plain copy, ms | GB/s | transfer, ms | GB/s | transfer / plain | checksum, ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, copy, fetches in ways:
        times: list[tuple[float, float, float]] = []
        for _ in range(args.rounds + 1):
            check = _seconds(lambda: [checksum(rows.runs(x, mine, 0, args.tokens)) for x in range(args.layers)])
            times.append((copy(), _fetch(fetches, giver, mine), check))
        a, b, c = (statistics.median(t[i] for t in times[1:]) for i in range(3))  # the first touches fresh memory
        print(
            f"| {name} | {a * 1e3:.1f} | {n / a / 1e9:.2f} | {b * 1e3:.1f} | {n / b / 1e9:.2f} | {a / b:.2f} |"
            f" {c * 1e3:.1f} |",
            flush=True,
        )
        fetches.close()


def _fast() -> Fast | None:
    """What a rank on the C++ kernels copies with; None where they cannot be had."""
    library = find_library(read_cpu().features)
    return CheckedCopy(open_library(library.path)) if isinstance(library, Built) else None


def _fetch(fetches: Fetches, giver: Giver, pages: list[int]) -> float:
    """Seconds from the moment when all rows are finished until all are here."""
    offer = giver.offer()
    fetches.fetch(1, offer, pages, 0)
    time.sleep(0.02)  # until it is connected, and waits

    giver.say(f"complete {offer.rid}")
    fetches.hurry(1)
    while not (ended := fetches.poll()):
        time.sleep(0.0001)
    there = time.monotonic()
    if ended[0].failure:
        raise SystemExit(ended[0].failure)
    return there - float(giver.hear())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _receive(port: int, into: Bytes) -> float:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        time.sleep(0.005)

        def copy() -> None:
            sock.sendall(b"!")
            view = into.data
            while view:
                n = sock.recv_into(view)
                if not n:
                    raise SystemExit("the plain copy ended early")
                view = view[n:]

        return _seconds(copy)


def _give(args: argparse.Namespace) -> None:
    """The other process: fills the shared cache, offers what it is told to, and sends plain bytes to whoever asks."""
    memory = np.memmap(os.fdopen(args.give, "r+b"), np.uint8)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, np.uint8)
    nixl = Nixl.start(Caller(SECRET)) if installed() else None
    registered = nixl.register(memory) if nixl else None
    offers = Offers(Rows(memory, args.layers, args.page, args.row_bytes), 0, registered=registered)
    offers.address = KvServer(offers, "127.0.0.1", SECRET, 30).address
    server = socket.create_server(("127.0.0.1", 0))
    n = args.layers * args.tokens * args.row_bytes
    threading.Thread(target=_send_plain, args=(server, memory[:n]), daemon=True).start()
    print(server.getsockname()[1], flush=True)
    for line in sys.stdin:
        what, rid = line.split()
        if what == "offer":
            offers.withdraw(int(rid) - 1)
            print(msgspec.json.encode(offers.offer(int(rid), 0, args.tokens)).decode(), flush=True)
        else:
            now = time.monotonic()
            offers.complete(int(rid), range(-(-args.tokens // args.page)))
            print(now, flush=True)
    os._exit(0)


def _send_plain(server: socket.socket, memory: Bytes) -> None:
    while True:
        sock, _ = server.accept()
        with sock:
            sock.settimeout(30)
            sock.recv(1)
            for at in range(0, memory.size, PIECE):
                sock.sendall(memory[at : at + PIECE].data)


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
