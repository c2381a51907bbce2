"""Starts `brigade serve` as a user does, and sees to it that nothing is left behind."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from bench.deployment import still_running
from tests.engine.hosting import ranks_of

START_DEADLINE = 60.0
END_DEADLINE = 15.0


@dataclass(frozen=True)
class Server:
    url: str
    process: "subprocess.Popen[str]"

    @property
    def worker(self) -> psutil.Process:
        """The process that owns the model."""
        [worker] = self.ranks
        return worker

    @property
    def ranks(self) -> list[psutil.Process]:
        """The processes of a unit of several ranks, in the order in which they were started."""
        return ranks_of(self.process.pid)

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "brigade", *arguments]


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server on a free port; ends with Ctrl-C, and fails if that leaves a process or a bad exit code."""
    process = subprocess.Popen(command("serve", "--port", "0", *arguments), stdout=subprocess.PIPE, text=True)
    try:
        server = Server(_ready(process), process)
        yield server
        family = server.family() if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        assert process.wait(END_DEADLINE) == 0
        assert not still_running(family, 2)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _ready(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()  # the engine's own deadlines end this: a server that cannot start exits
    found = re.fullmatch(r"Brigade is ready at (http://127\.0\.0\.1:\d+)\n", line)
    assert found, f"the first line of output was {line!r}"
    return found[1]


def until(condition: object, deadline: float, what: str) -> None:
    """Wait for a condition (a callable) at most `deadline` seconds."""
    end = time.monotonic() + deadline
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} did not happen within {deadline} s"
        time.sleep(0.02)
