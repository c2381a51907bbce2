"""A server process and `brigade bench` against it. Must not know what it serves."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.child import ROOT, ChildFailed, end_session
from bench.workloads import Lengths

MAY_FAIL = 0.05
"""Part of the requests that may fail and leave the rates usable: some servers drop a connection now and then."""


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server in a session of its own. Use it as a context manager: it is gone afterwards."""

    def __init__(self, command: list[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
                cwd=ROOT,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        end_session(self._process, grace=15.0)

    def wait(self, timeout: float) -> None:
        """Return when it names a model and says that it is healthy. Raises ChildFailed."""
        deadline = time.monotonic() + timeout
        while not (_answers(f"{self.url}/health") and _answers(f"{self.url}/v1/models")):
            if self._process.poll() is not None:
                raise ChildFailed(f"the server ended with {self._process.returncode} (see {self._log})")
            if time.monotonic() > deadline:
                raise ChildFailed(f"the server was not ready in {timeout:.0f} s (see {self._log})")
            time.sleep(0.5)


def load_test(url: str, concurrency: int, n_requests: int, lengths: Lengths, vocab: int, seed: int) -> dict[str, Any]:
    """The numbers of `brigade bench`. Raises ChildFailed if it failed, or more requests than MAY_FAIL did."""
    options = {
        "--url": url,
        "--concurrency": concurrency,
        "--requests": n_requests,
        "--input-len": lengths.n_in,
        "--output-len": lengths.n_out,
        "--vocab": vocab,
        "--seed": seed,
        "--timeout": 900,
        "--json": "-",
    }
    command = [sys.executable, "-m", "brigade", "bench", *(str(w) for pair in options.items() for w in pair)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if not done.stdout.strip():
        raise ChildFailed(f"brigade bench gave nothing: {done.stderr.strip()[-300:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    numbers = record["results"]
    if numbers["failed"] > MAY_FAIL * n_requests:
        raise ChildFailed(f"{numbers['failed']} requests failed: {numbers['first_error']}")
    return dict(numbers)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
