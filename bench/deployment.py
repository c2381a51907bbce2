"""A deployment started by `brigade up`, as its user and its operating system see it: clients, processes, memory, files.

Used to break it on purpose. Must not import the engine.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.child import ROOT
from brigade.cli.protocol import BadStream, EventDecoder, ServerError, error_text, parse_event

START = 60.0
"""Seconds that a fleet of the demo model may take to load."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client has got."""

    text: str
    failure: str = ""
    """Kind of what went wrong: "HTTP 503", "error event", "no connection", "broken stream", "no answer in time"."""
    detail: str = ""
    left: bool = False
    """The client did not want more."""


async def ask(
    client: httpx.AsyncClient, prompt: Sequence[int], n: int, deadline: float, leave_after: float | None = None
) -> Answer:
    """One streamed completion of `n` tokens, greedy, whatever happens; `leave_after`: seconds that the client stays."""
    heard: list[str] = []
    body = {
        "model": "brigade-demo",
        "prompt": list(prompt),
        "max_tokens": n,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }

    def failed(kind: str, e: BaseException) -> Answer:
        return Answer("".join(heard), kind, str(e) or type(e).__name__)

    try:
        async with asyncio.timeout(deadline if leave_after is None else leave_after):
            done = await _listen(client, body, heard)
    except TimeoutError as e:
        if leave_after is not None:
            return Answer("".join(heard), left=True)
        return failed("no answer in time", e)
    except _Refused as e:
        return failed(f"HTTP {e.status}", e)
    except ServerError as e:
        return failed("error event", e)
    except (httpx.ConnectError, httpx.ConnectTimeout) as e:
        return failed("no connection", e)
    except (httpx.HTTPError, httpx.StreamError, BadStream) as e:
        return failed("broken stream", e)
    return Answer("".join(heard)) if done else Answer("".join(heard), "broken stream", "it ended without [DONE]")


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _listen(client: httpx.AsyncClient, body: dict[str, Any], heard: list[str]) -> bool:
    """Whether the stream came to its end."""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise _Refused(answer.status_code, error_text(answer.status_code, await answer.aread()))
        decoder, done = EventDecoder(), False
        async for chunk in answer.aiter_bytes():
            for piece in map(parse_event, decoder.feed(chunk)):
                heard.append(piece.text)
                done = done or piece.done
        return done


class Gateway:
    """`brigade up FILE`, which may be killed and started again."""

    def __init__(self, file: Path, port: int, log: Path, admin: tuple[int, str] = (0, "")) -> None:
        """`file` must say that it listens on this port of the loopback, and for orders on the port of `admin`, whose
        other half is their key; output goes to the end of `log`."""
        self.file, self.url, self.log, self._admin = file, f"http://127.0.0.1:{port}", log, admin
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it and wait until it is ready. Raises RuntimeError, TimeoutError."""
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brigade", "up", str(self.file), "--log-level", "warning"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
            )
        if not await self.is_ready(START):
            raise TimeoutError(f"{self.url} is not ready after {START:g} s (see {self.log})")

    async def is_ready(self, seconds: float) -> bool:
        """Whether /ready says so within this time. Raises RuntimeError if the process has ended."""
        until = time.monotonic() + seconds
        async with self.client() as client:
            while time.monotonic() < until:
                if self._process is None or self._process.poll() is not None:
                    raise RuntimeError(f"the gateway has ended (see {self.log})")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/ready", timeout=2)).status_code == 200:
                        return True
                await asyncio.sleep(0.05)
        return False

    def client(self) -> httpx.AsyncClient:
        """Without limits: `ask` has a deadline of its own."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False, verify=False)

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def ranks(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [p for p in self.process.children(recursive=True) if _name(p) == "brigade-rank"]

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    async def kill(self) -> None:
        """kill -9 of the gateway alone."""
        assert self._process is not None
        self._process.kill()
        while self._process.poll() is None:
            await asyncio.sleep(0.01)

    async def end(self, seconds: float = 30.0) -> int:
        """End it as Ctrl-C does, by force after so many seconds; its exit code."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(signal.SIGINT)
        until = time.monotonic() + seconds
        while process.poll() is None:
            if time.monotonic() > until:
                process.kill()
            await asyncio.sleep(0.02)
        return process.returncode

    async def order(self, unit: str, what: str, body: dict[str, Any]) -> int:
        """Have a unit do something; the status of the answer."""
        port, key = self._admin
        url, headers = f"http://127.0.0.1:{port}/admin/units/{unit}/{what}", {"Authorization": f"Bearer {key}"}
        async with self.client() as client:
            return (await client.post(url, json=body, headers=headers, timeout=10)).status_code

    async def metrics(self) -> "Metrics":
        async with self.client() as client:
            return Metrics((await client.get("/metrics", timeout=10)).text)


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.lines = [line for line in text.splitlines() if line.startswith("brigade_")]

    def sum(self, name: str, label: str = "") -> float:
        """Of all series with this name, without `brigade_`, whose labels contain `label`."""
        return sum(value for line, value in self._of(name) if label in line)

    @property
    def held(self) -> dict[str, float]:
        """What is not zero of requests and pages that somebody holds."""
        names = ("num_requests_running", "num_requests_waiting", "kv_pages_held", "handover_requests")
        return {line: value for name in names for line, value in self._of(name) if value}

    def _of(self, name: str) -> Iterator[tuple[str, float]]:
        for line in self.lines:
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"brigade_{name}":
                yield series, float(value)


def still_running(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended within this time. Whose parent is gone may wait a while for the system to bury it."""
    until = time.monotonic() + seconds
    while (left := [p for p in processes if _runs(p)]) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def shared_memory() -> set[str]:
    """Files with a name in the machine's shared memory."""
    return set(os.listdir("/dev/shm"))


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
