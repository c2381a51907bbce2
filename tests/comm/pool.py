"""Four rank processes for the whole test run: starting them costs seconds, using them again does not."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from brigade.comm.segment import Segment

ROOT = Path(__file__).parents[2]
N = 4
WIDTH, K, MAX_TOKENS = 136, 3, 64
"""136: a whole tile of the 8-bit wires, and a short one."""
HOSTS = {1: [1], 2: [1, 1], 3: [2, 1], 4: [2, 2]}
"""How many of a unit's ranks are on each host, for the hierarchical exchange."""


class Pool:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.segments = {size: Segment.create(size, MAX_TOKENS, WIDTH, K) for size in range(1, N + 1)}
        self.hosts = {
            size: [Segment.create(n, MAX_TOKENS * size, WIDTH, K) for n in hosts] for size, hosts in HOSTS.items()
        }
        self._opened = 0
        self.ranks = [self._start() for _ in range(N)]
        for rank in range(N):
            self.tell(rank, do="hello")
        assert self.hear_all(range(N), 120) == [{"ok": "ready"}] * N

    def _start(self) -> "subprocess.Popen[bytes]":
        fds = tuple(s.fd for s in self._all_segments())
        command = [sys.executable, "-m", "tests.comm.rank"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, pass_fds=fds)

    def tell(self, to: int, **command: Any) -> None:
        stdin = self.ranks[to].stdin
        assert stdin
        stdin.write(json.dumps(command).encode() + b"\n")
        stdin.flush()

    def hear(self, rank: int, seconds: float = 30) -> dict[str, Any]:
        stdout = self.ranks[rank].stdout
        assert stdout
        assert select.select([stdout], [], [], seconds)[0], f"rank {rank} says nothing for {seconds} s"
        line = stdout.readline()
        assert line, f"rank {rank} is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def hear_all(self, ranks: "range | list[int]", seconds: float = 30) -> list[dict[str, Any]]:
        return [self.hear(rank, seconds) for rank in ranks]

    def all(self, size: int, **command: Any) -> list[dict[str, Any]]:
        """The same command to the first `size` ranks."""
        for rank in range(size):
            self.tell(rank, **command)
        return self.hear_all(range(size))

    def open(self, backend: str, size: int, deadline: float = 10) -> None:
        """Form a new group of that backend. A segment's earlier generation is stopped first."""
        self._opened += 1
        for rank in range(size):
            if self.ranks[rank].poll() is not None:  # another test ended it and then failed
                self.replace(rank)
        commands = [self._at(backend, size, rank) for rank in range(size)]
        for rank in range(size):
            self.tell(
                rank,
                do="open",
                backend=backend,
                rank=rank,
                size=size,
                deadline=deadline,
                **commands[rank],
            )
        answers = self.hear_all(range(size))
        assert answers == [{"ok": "open"}] * size, answers

    def _at(self, backend: str, size: int, rank: int) -> dict[str, Any]:
        if backend == "shared":
            segment = self.segments[size]
            if rank == 0:
                segment.stop(segment.stopped + 1)
            return {"fd": segment.fd, "generation": segment.stopped + 1}
        if backend == "hosts":
            return self._on_hosts(size, rank)
        if backend == "mesh":
            if rank == 0:
                self._addresses = [answer["ok"] for answer in self.all(size, do="listen")]
            return {"addresses": self._addresses}
        return {"path": str(self.directory / "store"), "prefix": f"group-{self._opened}"}

    def _on_hosts(self, size: int, rank: int) -> dict[str, Any]:
        """The ranks of a unit as if they were on two hosts, each with a segment of its own."""
        hosts = HOSTS[size]
        host, local = next((h, rank - sum(hosts[:h])) for h in range(len(hosts)) if rank < sum(hosts[: h + 1]))
        segment = self.hosts[size][host]
        if local == 0:
            segment.stop(segment.stopped + 1)
        return {
            **self._at("mesh", size, rank),
            **{"hosts": hosts, "local": local, "fd": segment.fd, "generation": segment.stopped + 1},
        }

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.ranks[rank].pid, how)

    def replace(self, rank: int) -> None:
        """End a rank's process and start another in its place."""
        self.ranks[rank].kill()
        self._reap(rank)
        self.ranks[rank] = self._start()
        self.tell(rank, do="hello")
        assert self.hear(rank, 60) == {"ok": "ready"}

    def _reap(self, rank: int) -> None:
        process = self.ranks[rank]
        process.wait(10)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def close(self) -> None:
        for rank, process in enumerate(self.ranks):
            process.kill()
            self._reap(rank)
        for segment in self._all_segments():
            segment.close()

    def _all_segments(self) -> list[Segment]:
        return [*self.segments.values(), *(s for hosts in self.hosts.values() for s in hosts)]
