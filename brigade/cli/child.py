"""A `brigade serve` of `brigade chat`'s own: starts it, waits until it is ready, ends it. Must not speak HTTP.

1. started in a session of its own, so that Ctrl-C at the terminal reaches the chat alone; its stdin is a pipe that
   closes with this process, however this process ends, and then it ends too (--until-eof)
2. its stderr is ours: the progress of loading and its one-line errors appear where the person looks
3. ready when it prints the line of READY; ended by SIGTERM (a shell may have told it to ignore SIGINT), and
   killed if it does not follow within CLOSE_DEADLINE
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

import typer

from brigade.cli.fault import Fault

READY = "Brigade is ready at "
START_DEADLINE = 1800.0
"""Seconds in which the largest model must be loaded; a progress bar tells the person to keep waiting."""
CLOSE_DEADLINE = 15.0
_TEXT: Any = {"encoding": "utf-8", "errors": "replace"}


def serve_command(model: str | None) -> list[str]:
    """The command line of the child: the demo model if `model` is None."""
    command = [sys.executable, "-P", "-m", "brigade", "serve", "--port", "0", "--log-level", "warning", "--until-eof"]
    return command if model is None else [*command, "--", model]


class OwnServer:
    """A running child server; use it as a context manager."""

    def __init__(
        self,
        command: Sequence[str],
        api_key: str | None,
        *,
        start_deadline: float = START_DEADLINE,
        close_deadline: float = CLOSE_DEADLINE,
    ) -> None:
        """Start it and wait until it is ready. Raises Fault when it does not become so, and typer.Exit with the child's
        exit code when the child has already said why it cannot start."""
        self._close_deadline = close_deadline
        # The key goes through the environment: other users can see command lines.
        env = {**os.environ, "BRIGADE_API_KEY": api_key} if api_key else dict(os.environ)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True, **_TEXT
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process.stdout, lines), daemon=True).start()
        try:
            self.url = self._await_ready(lines, start_deadline)
        except BaseException:
            self.close()
            raise

    def _await_ready(self, lines: "queue.SimpleQueue[str]", deadline: float) -> str:
        while True:
            try:
                line = lines.get(timeout=deadline)
            except queue.Empty:
                raise Fault(f"the server was not ready within {deadline:g} s") from None
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
            if not line:
                code = self._process.wait()
                if code > 0:
                    raise typer.Exit(code)
                raise Fault(f"the server ended before it was ready (exit code {code})")

    def close(self) -> None:
        """End the child and wait for it; harmless when it has ended."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._close_deadline)
        except subprocess.TimeoutExpired:
            # Its session is its own, so this reaches what it has started, too.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def __enter__(self) -> "OwnServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _forward(pipe: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    """Put each line in the queue and "" at the end, so that the child never blocks on a full pipe."""
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put("")
