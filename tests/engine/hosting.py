"""Hosts on this machine's loopback: 127.0.0.1 is the head, 127.0.0.2 and up join it."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil

from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig, HostsConfig
from brigade.engine.fleet_config import FleetConfig
from brigade.engine.fleet_start import Base, start_units
from brigade.engine.host_messages import Goodbye
from brigade.engine.output import Unobserved
from brigade.engine.supervisor import JoinConfig, supervise
from brigade.spec.layout import Host, Layout

SECRET = b"0123456789abcdef0123456789abcdef"


def layout_of(*sizes: int) -> Layout:
    return Layout(tuple(Host(f"127.0.0.{i + 1}", n) for i, n in enumerate(sizes)))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def joining(port: int, host: int, **settings: Any) -> JoinConfig:
    said = {"secret": SECRET, "wait": 30.0, **settings}
    return JoinConfig(head=("127.0.0.1", port), address=f"127.0.0.{host + 1}", **said)


async def started(config: EngineConfig, hosts: HostsConfig) -> Base:
    """One unit over hosts, with an engine; `close` ends it and lets the others go."""
    return await start_units(FleetConfig.alone(config), hosts, lambda _: None, Unobserved())


@contextlib.asynccontextmanager
async def several(*sizes: int, **settings: Any) -> AsyncIterator[Engine]:
    """An engine over hosts whose supervisors run in this process."""
    port, layout = free_port(), layout_of(*sizes)
    supervisors = [asyncio.create_task(supervise(joining(port, h))) for h in range(1, len(sizes))]
    config = EngineConfig(ranks=layout.n_ranks, threads=1, **settings)
    try:
        base = await started(config, HostsConfig(layouts=(layout,), secret=SECRET, port=port, wait=30))
        try:
            yield base.engines[0]
        finally:
            await base.close()
        ends = await asyncio.wait_for(asyncio.gather(*supervisors), 20)
        assert [type(e) for e in ends] == [Goodbye] * len(supervisors), "they end with the head"
    finally:
        for task in supervisors:
            task.cancel()
        await asyncio.gather(*supervisors, return_exceptions=True)


def secret_file(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_bytes(SECRET + b"\n")
    path.chmod(mode)
    return path


def ranks_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a server or supervisor, in the order in which they were started."""
    ranks = [p for p in psutil.Process(pid).children() if p.name() == "brigade-rank"]
    return sorted(ranks, key=lambda p: (p.create_time(), p.pid))


class Supervisor:
    """`brigade join` as a process, and the ranks under it."""

    def __init__(self, port: int, host: int, secret: Path) -> None:
        head, address = f"127.0.0.1:{port}", f"127.0.0.{host + 1}"
        command = [sys.executable, "-m", "brigade", "join", head, "--address", address, "--secret-file", str(secret)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": _HERE})

    def ranks(self) -> list[psutil.Process]:
        """In the order of their start."""
        return ranks_of(self.process.pid)

    def close(self) -> None:
        family = [*psutil.Process(self.process.pid).children(), self.process] if self.process.poll() is None else []
        for process in family:
            process.kill()
        self.process.wait(10)


_HERE = os.pathsep.join(p or os.getcwd() for p in sys.path)


@contextlib.contextmanager
def supervisor(port: int, host: int, secret: Path) -> Iterator[Supervisor]:
    made = Supervisor(port, host, secret)
    try:
        yield made
    finally:
        made.close()
