"""What an engine gives its tokens to: a whole generation, or the part of one that its unit runs. No behaviour."""

from typing import Protocol

from brigade.engine.messages import Adopted, Computed, Gone, Offered, Reserved, Token
from brigade.engine.output import EngineError


class Leg(Protocol):
    """A request, or the part of it that one unit runs, as the engine sees it. A Generation is one."""

    @property
    def rid(self) -> int: ...
    def push(self, token: Token) -> None: ...
    def fail(self, error: EngineError) -> None:
        """The rank that ran it is lost, or refuses it."""


class Part(Leg, Protocol):
    """What one unit does for a request that other units serve as well."""

    def hear(self, message: Reserved | Offered | Computed | Adopted | Gone) -> None: ...
