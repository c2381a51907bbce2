"""What the HTTP front end costs: small streamed chats against an engine that takes no computing time, on one core.

    python -m bench.gateway [--rate 1500] [--seconds 10] [--tokens 8] [--token-ms 5] [--connections 192]

1. The server (`bench.gateway_server`) is `brigade.serve` as it is, with an API key, the demo model's tokenizer and chat
   template, and metrics, in a process that is held to one core. Its engine makes no tokens, it only gives one every
   `--token-ms`, through the real Generation, so text is made as always.
2. The load comes from this process, held to another core: bare asyncio protocols that send prepared bytes and look only
   for the ends of answers. Every answer's text is compared.
3. Open loop: requests come at random times (Poisson), `--rate` a second, each timed from when it was due. Closed loop:
   each of `--connections` sends its next request when the last one is answered, which shows what a core can do at most.
4. The limit is a server on the same event loop that knows nothing of HTTP: it writes the same bytes in as many
   pieces.

Added latency is what the client waited less what the engine took. `first`: until the first event with text; `end`:
until the answer is complete; each holds the way in of the request, and the way out of the first or the last token.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from bench.gateway_server import KEY, MODEL, STORY
from brigade.cli.load import arrivals, percentile

WARM_UP = 1.0
"""Seconds of load before a server is measured."""
PATIENCE = 10.0
"""Seconds after the last request until every answer must be there."""
LAST_CHUNK = b"0\r\n\r\n"
END = b"data: [DONE]\n\n\r\n" + LAST_CHUNK
TEXT = re.compile(rb'"content":"([^"]+)"')


@dataclass
class Sent:
    """One request; nanoseconds."""

    due: int
    first: int = 0
    end: int = 0


@dataclass
class Load:
    """What is sent to one server."""

    n_tokens: int
    sent: list[Sent] = field(default_factory=list)
    """A request's number is its place here, and its seed."""
    answer: bytes = b""
    """The first one: the others must have its text."""

    def next(self, due: int) -> tuple[Sent, bytes]:
        """The next request, and its bytes."""
        content = json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": STORY}],
                "max_tokens": self.n_tokens,
                "temperature": 0,
                "stream": True,
                "seed": len(self.sent),
            },
            separators=(",", ":"),
        ).encode()
        self.sent.append(Sent(due))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return self.sent[-1], head.encode() + content

    def check(self, answer: bytes) -> None:
        """Raises ValueError for another answer than the first one."""
        self.answer = self.answer or answer
        text, due = (b"".join(TEXT.findall(x)) for x in (answer, self.answer))
        if not text or text != due or not answer.startswith(b"HTTP/1.1 200") or not answer.endswith(END):
            raise ValueError(f"not the answer that was asked for: {answer[:500]!r}")


class Client(asyncio.Protocol):
    """One connection, one request at a time. `free` is called when it can take the next one."""

    def __init__(self, load: Load, free: Callable[["Client"], None], failed: asyncio.Future[None]) -> None:
        self._load, self.free, self._failed = load, free, failed
        self._parts: list[bytes] = []
        self._sent: Sent | None = None
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent is not None and not self._failed.done():
            self._failed.set_exception(ConnectionError(f"a connection was lost while an answer came: {exc}"))

    def send(self, due: int) -> None:
        self._sent, request = self._load.next(due)
        self._parts = []
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        sent, now = self._sent, time.monotonic_ns()
        self._parts.append(data)
        if sent is None:
            return
        if not sent.first and TEXT.search(data):
            sent.first = now
        if data.endswith(LAST_CHUNK):
            sent.end, self._sent = now, None
            try:
                self._load.check(b"".join(self._parts))
            except ValueError as e:
                if not self._failed.done():
                    self._failed.set_exception(e)
            self.free(self)


@dataclass(frozen=True)
class Run:
    """One stretch of load."""

    first: int
    last: int
    """Numbers of its requests, the last one excluded."""
    seconds: float
    cpu: float
    """Seconds that the server's process computed."""

    @property
    def n(self) -> int:
        return self.last - self.first


class Target:
    """A server's process and the connections to it."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, n_tokens: int) -> None:
        parts = urlsplit(url)
        self._process, self._address = process, (parts.hostname or "", parts.port or 0)
        self.load = Load(n_tokens)
        self._idle: list[Client] = []
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def closed(self, n: int, seconds: float) -> Run:
        """`n` connections send one request after the other."""
        until = time.monotonic() + seconds

        def again(client: Client) -> None:
            if time.monotonic() < until:
                client.send(time.monotonic_ns())
            else:
                self._idle.append(client)

        async def start() -> None:
            for client in [await self._client(again) for _ in range(n)]:
                again(client)

        return await self._measured(start)

    async def open(self, rate: float, seconds: float, seed: int = 1) -> Run:
        """Requests at random times. Never sleeps: timers are too coarse, and this process has a core of its own."""
        times = arrivals(int(rate * seconds), rate, seed)

        async def start() -> None:
            begin = time.monotonic_ns()
            for at in times:
                due = begin + int(1e9 * at)
                while time.monotonic_ns() < due:
                    await self._pause(0)
                client = self._idle.pop() if self._idle else await self._client(self._idle.append)
                client.send(due)

        return await self._measured(start)

    async def _client(self, free: Callable[[Client], None]) -> Client:
        if self._idle:
            client = self._idle.pop()
            client.free = free
            return client
        make = asyncio.get_running_loop().create_connection
        return (await make(lambda: Client(self.load, free, self._failed), *self._address))[1]

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._failed.done():
            self._failed.result()

    async def _measured(self, work: Callable[[], Awaitable[None]]) -> Run:
        first, cpu = len(self.load.sent), self._cpu()
        await work()
        patience = time.monotonic() + PATIENCE
        while not all(sent.end for sent in self.load.sent[first:]):
            if time.monotonic() > patience:
                raise TimeoutError(f"an answer has not come within {PATIENCE:g} s")
            await self._pause(0.01)
        sent = self.load.sent[first:]
        seconds = 1e-9 * (max(s.end for s in sent) - min(s.due for s in sent))
        return Run(first, len(self.load.sent), seconds, self._cpu() - cpu)

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(core: int, options: argparse.Namespace, folder: Path, pieces: list[bytes] | None = None) -> Iterator[Target]:
    """A server while it is needed. Afterwards the folder holds its times."""
    command = [sys.executable, "-m", "bench.gateway_server", str(core), str(options.token_ms / 1e3)]
    command.append(str(folder / "times.json"))
    if pieces is not None:
        (folder / "pieces.json").write_text(json.dumps([p.decode("latin-1") for p in pieces]))
        command.append(str(folder / "pieces.json"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Target(process, process.stdout.readline().strip(), options.tokens)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def cut(answer: bytes) -> list[bytes]:
    """An answer as it is written: what comes before the first text, then a piece for each text."""
    marks = [found.start() for found in re.finditer(rb"[0-9a-f]+\r\ndata: ", answer)]
    starts = [at for at, end in zip(marks, [*marks[1:], len(answer)], strict=True) if TEXT.search(answer[at:end])]
    return [answer[a:b] for a, b in zip([0, *starts], [*starts, len(answer)], strict=True)]


def added(load: Load, run: Run, times: dict[str, list[int]]) -> tuple[list[float], list[float]]:
    """Milliseconds that requests of a run waited for something else than the engine: until their first text, and until
    their end."""
    first, end = [], []
    for i in range(run.first, run.last):
        sent, (came, told_first, told_last) = load.sent[i], times[str(i)]
        first.append(1e-6 * (sent.first - sent.due - (told_first - came)))
        end.append(1e-6 * (sent.end - sent.due - (told_last - came)))
    return first, end


async def measure(options: argparse.Namespace, core: int) -> int:
    print(
        "| server | at most, requests/s | CPU us a request | requests/s | core busy | first +ms p50 | p99 | largest "
        "| end +ms p50 | p99 | largest |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    pieces: list[bytes] | None = None
    most: list[float] = []
    for name in "brigade", "the limit":
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with server(core, options, folder, pieces) as target:
                await target.closed(4, WARM_UP)
                opened = await target.open(options.rate, options.seconds)
                closed = await target.closed(options.connections, options.seconds)
                pieces = pieces or cut(target.load.answer)
            times = json.loads((folder / "times.json").read_text())
        most.append((closed.last - closed.first) / closed.seconds)
        n = opened.last - opened.first
        cells = [
            f"{most[-1]:.0f}",
            f"{1e6 * closed.cpu / (closed.last - closed.first):.0f}",
            f"{n / opened.seconds:.0f}",
        ]
        cells.append(f"{100 * opened.cpu / opened.seconds:.0f} %")
        for waits in added(target.load, opened, times):
            cells += [f"{percentile(waits, 50):.2f}", f"{percentile(waits, 99):.2f}", f"{max(waits):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"of the limit: {most[0] / most[1]:.2f}; aims: {options.rate:g} requests/s, +5 ms at p99")
    return 0


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.gateway", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=1500.0, help="requests a second in the open loop")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each loop")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--token-ms", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=384, help="in the closed loop")
    options = parser.parse_args()
    mine, *others = sorted(os.sched_getaffinity(0), reverse=True)
    if not others:
        parser.error("the load needs a core beside the server's, but there is only one")
    os.sched_setaffinity(0, {mine})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(options, others[-1]))


if __name__ == "__main__":
    sys.exit(main())
