"""A real crew over engines that are up and do nothing; parts of requests are given to it by hand."""

import asyncio
from types import SimpleNamespace
from typing import Any

from brigade.core.handover import State
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.crew import Crew, Member
from brigade.engine.flight import RequestPart
from brigade.engine.messages import Ready
from brigade.engine.output import Health
from brigade.spec.config import read_spec
from brigade.spec.layout import Role


class IdleEngine:
    def __init__(self) -> None:
        self.config, self.spec = EngineConfig(max_running=4, max_waiting=2), read_spec(DEMO_MODEL)
        self.ready = Ready(n_pages=64, page=16, max_context=256, notes=[])
        self.up = True
        self.quiet = 0.0
        self.n_restarts = 0
        self.restarted = asyncio.Event()

    def health(self) -> Health:
        return Health(self.up, "ok" if self.up else "rank 0: its process ended")

    async def restart(self) -> None:
        self.n_restarts += 1
        self.up = False
        await self.restarted.wait()
        self.up = True


def fake_crew(*roles: Role) -> Crew:
    """Units called by their role and a number."""
    n: dict[str, int] = {}
    members = []
    for role in roles:
        n[role] = n.get(role, -1) + 1
        members.append(Member(f"{role}-{n[role]}", IdleEngine(), role, role))  # type: ignore[arg-type]
    return Crew(members)


def give(crew: Crew, side: Any, rid: int, state: State = State.DECODING) -> RequestPart | None:
    """A part of some request in this state."""
    return crew.choose(SimpleNamespace(tokens=[1, 2, 3], salt="", state=state), side, rid, 8)  # type: ignore[arg-type]
