"""One worker process and the channel to it: start it, wait until it is ready, find out why it died, end it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from brigade.comm.channel import AsyncChannel, ChannelBroken, ChannelClosed
from brigade.engine.config import EngineConfig
from brigade.engine.messages import Failed, FromWorker, Loading, Lost, Ready, Start
from brigade.engine.output import LoadError

LOAD_SILENCE = 300.0
"""Loading tells of every half per cent; a worker silent for longer than this many seconds is given up."""
END_DEADLINE = 5.0
"""Seconds a worker has to end by itself once its channel is closed."""


class WorkerProcess:
    """A running worker. The channel closes by itself when the process dies, whatever kills it."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: "AsyncChannel[FromWorker]") -> None:
        self._process, self.channel = process, channel

    @classmethod
    async def start(cls, config: EngineConfig, rank: int = 0, segment: int = -1) -> "WorkerProcess":
        """Start the process of a rank and tell it what to load. Raises LoadError if the system cannot start one.

        `segment`: file number of the memory that the ranks share; the process inherits it under the same number.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as e:
            raise LoadError(f"no channel to a worker process can be made: {e}") from e
        with theirs:
            try:
                process = _launch(theirs.fileno(), segment)
            except OSError as e:
                ours.close()
                raise LoadError(f"no worker process can be started: {e}") from e
        worker = cls(process, await AsyncChannel.over(ours, FromWorker))
        worker.channel.send(Start(config, rank, segment))
        return worker

    async def ready(self, progress: Callable[[Loading], None]) -> Ready:
        """Wait until the model is loaded. Raises LoadError if it cannot be, or if the process dies or falls silent."""
        try:
            while True:
                for message in await asyncio.wait_for(self.channel.receive(), LOAD_SILENCE):
                    match message:
                        case Loading():
                            progress(message)
                        case Ready():
                            return message
                        case Failed(text) | Lost(_, text):
                            raise LoadError(text)
                        case _:
                            raise ChannelBroken(f"{type(message).__name__} before Ready")
        except TimeoutError:
            raise LoadError(f"loading made no progress for {LOAD_SILENCE:.0f} s") from None
        except (ChannelClosed, ChannelBroken) as e:
            raise LoadError(f"the worker process ended while loading ({await self.end()})") from e

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End a stuck process; the channel will close."""
        self._process.kill()

    async def end(self) -> str:
        """Close the channel, wait for the process to leave, kill it if it does not; says how it ended."""
        self.channel.close()
        if await self._exit_code(END_DEADLINE) is None:
            self._process.kill()
        code = await self._exit_code(END_DEADLINE)
        if code is None:
            return "it cannot be killed"
        return f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"

    async def _exit_code(self, deadline: float) -> int | None:
        """Exit code, waiting up to `deadline` seconds for it; None while the process runs."""
        end = time.monotonic() + deadline
        while self._process.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self._process.poll()


def _launch(fd: int, segment: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        # -P: -m alone would put the current directory first, and a stray module there would be run.
        [sys.executable, "-P", "-m", "brigade.engine.loop", str(fd)],
        pass_fds=[fd] if segment < 0 else [fd, segment],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone; the worker ends when it closes
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
            # OpenMP's default is to spin while waiting: two threads then take turns on a core that anything else also
            # wants, and decoding was measured 30 times slower.
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    )


def _signal_name(number: int) -> str:
    """Real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
