"""One worker process and the channel to it: start it, find out how it ended, end it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

from brigade.comm.channel import AsyncChannel
from brigade.engine import forks
from brigade.engine.messages import FromWorker, Start
from brigade.engine.output import LoadError

Child = subprocess.Popen[bytes] | forks.Forked

END_DEADLINE = 5.0
"""Seconds a worker has to end by itself once its channel is closed."""


class WorkerProcess:
    """A running worker. The channel closes by itself when the process dies, whatever kills it."""

    def __init__(self, process: Child, channel: "AsyncChannel[FromWorker]") -> None:
        self._process, self.channel = process, channel

    @classmethod
    async def start(cls, start: Start) -> "WorkerProcess":
        """Start a process and tell it what to load. Raises LoadError if the system cannot start one.

        The process inherits the shared memory that `start` names, under the same file numbers.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as e:
            raise LoadError(f"no channel to a worker process can be made: {e}") from e
        with theirs:
            try:
                process = await _launch([theirs.fileno(), *_inherited(start)])
            except OSError as e:
                ours.close()
                raise LoadError(f"no worker process can be started: {e}") from e
        try:
            worker = cls(process, await AsyncChannel.over(ours, FromWorker))
        except BaseException:
            process.kill()
            process.wait()
            raise
        worker.channel.send(start)
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process since the last call: it neither works nor ends. No terminal sends
        one, since a worker has a session of its own."""
        if self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None

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
            await asyncio.sleep(0.002)
        return self._process.poll()


def _inherited(start: Start) -> list[int]:
    segment = [start.segment] if start.segment >= 0 else []
    return [*segment, *(file for file in (start.kv.files if start.kv else ()) if file >= 0)]


async def _launch(files: list[int]) -> Child:
    """`files`: what the process inherits, under the same numbers; the first is its channel. Raises OSError."""
    if sys.platform != "linux":
        return _started(files)
    forking = asyncio.ensure_future(asyncio.to_thread(forks.fork, files))
    try:
        return await asyncio.shield(forking)
    except asyncio.CancelledError:
        process = await forking
        process.kill()
        process.wait()
        raise


def _started(files: list[int]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        # -P: -m alone would put the current directory first, and a stray module there would be run.
        [sys.executable, "-P", "-m", "brigade.engine.loop", str(files[0])],
        pass_fds=files,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone; the worker ends when it closes
        env=forks.environment(),
    )


def _signal_name(number: int) -> str:
    """Real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
