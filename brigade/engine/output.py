"""What the engine gives its callers, and how it says no."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, best first."""


class Delta(NamedTuple):
    """The next piece of one generation. The last one has a finish_reason; the texts joined are the whole answer."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when logprobs were asked for."""
    finish_reason: str | None = None
    """"stop" or "length"; None while it goes on."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for end of sequence and length."""
    n_cached: int = 0
    """Prompt tokens found in the prefix cache."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, from the moment the request was given to the engine."""

    ttft: float
    total: float
    n_tokens: int

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.total - self.ttft) / max(self.n_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    n_prompt: int
    n_cached: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine can answer now, and if not, why not."""

    ready: bool
    reason: str


class Observer(Protocol):
    """Hears what happens to requests, for metrics. Called on the event loop; must be quick."""

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None: ...
    def next_token(self, seconds: float) -> None:
        """Seconds since the same request's previous token."""

    def finished(self, timings: Timings, reason: str) -> None:
        """reason: stop, length, abort (the caller left) or error."""

    def restarted(self) -> None:
        """The worker died and a new one is being started."""

    def placed(self, rid: int, part: int) -> None:
        """A rank of a fleet works for request `rid` from now on, under the number `part`."""

    def moved(self, rid: int, state: str) -> None:
        """Request `rid` of a fleet has come to this state of its hand-over."""


class EngineError(Exception):
    """The engine cannot serve this request now."""


class QueueFull(EngineError):
    """Too many requests wait; come back in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(EngineError):
    """The worker is gone, starting again or shutting down; the same request may work later."""


class BadRequest(EngineError):
    """The request itself cannot be served: it will not work later either."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownUnit(EngineError):
    """There is no unit of that name."""


class NotAllowed(EngineError):
    """What was asked of a unit would do harm, or cannot be done now. The message says why."""


class LoadError(Exception):
    """The model cannot be loaded; the message names the file and what to do."""


class Unobserved:
    """An Observer that does not listen."""

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, timings: Timings, reason: str) -> None: ...
    def restarted(self) -> None: ...
    def placed(self, rid: int, part: int) -> None: ...
    def moved(self, rid: int, state: str) -> None: ...
