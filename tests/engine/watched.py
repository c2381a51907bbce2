"""An engine whose worker process the tests kill, stop and count."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.engine.output import Unobserved
from tests.engine.conftest import workers


class Restarts(Unobserved):
    """An Observer that counts restarts."""

    def __init__(self) -> None:
        self.n = 0

    def restarted(self) -> None:
        self.n += 1


class Served:
    """An engine, what its observer heard, and its worker's process id."""

    def __init__(self, engine: Engine, restarts: Restarts, others: set[int]) -> None:
        self.engine, self.restarts, self.others = engine, restarts, others

    @property
    def pid(self) -> int:
        (pid,) = workers() - self.others
        return pid

    def kill(self, how: signal.Signals | int = signal.SIGKILL) -> int:
        pid = self.pid
        os.kill(pid, how)
        return pid


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    others, restarts = workers(), Restarts()
    engine = await Engine.start(EngineConfig(**settings), observer=restarts)
    try:
        yield Served(engine, restarts, others)
    finally:
        await engine.close()
        assert workers() <= others
