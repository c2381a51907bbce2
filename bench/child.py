"""An adapter process as its parent sees it: started, asked, timed out, ended. Must not know what the jobs mean."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class ChildFailed(RuntimeError):
    """The process ended or was too slow. The message says which and where its log is."""


class JobRefused(RuntimeError):
    """The engine cannot do one job; it can go on with others."""


class Child:
    """One adapter process in a session of its own. Use it as a context manager: it is gone afterwards.

    Only one lives at a time, so an engine that is not asked uses neither cores nor memory.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._pending = b""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                cwd=ROOT,
                start_new_session=True,
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ready(self, timeout: float) -> dict[str, Any]:
        """Wait until it has loaded; what it says about itself. Raises ChildFailed."""
        return dict(self._read(timeout)["ready"])

    def ask(self, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Do one job; its result. Raises ChildFailed, and JobRefused if the engine goes on but cannot do this job."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as e:
            raise ChildFailed(self._last_words("ended")) from e
        result = self._read(timeout)
        if "error" in result:
            raise JobRefused(str(result["error"]))
        return result

    @property
    def pid(self) -> int:
        """Of the process, and of its session."""
        return self._process.pid

    def end(self, grace: float = 10.0) -> None:
        """Give it `grace` seconds to finish, then end it with everything that it started."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except OSError:
                self._process.poll()  # it is gone already, with a line unread
        end_session(self._process, grace)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise ChildFailed(self._last_words(f"gave no answer in {timeout:.0f} s"))
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ChildFailed(self._last_words("ended"))
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return dict(json.loads(line))

    def _last_words(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{what}: {lines[-1][:200] if lines else 'it said nothing'} (see {self._log})"


def end_session(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """Wait `grace` seconds for a process that leads its own session, then end all of that session."""
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    except ProcessLookupError:
        return
