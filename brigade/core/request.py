"""One request as the scheduler sees it: tokens, how far they are computed, and when to stop."""

from dataclasses import dataclass, field
from typing import Literal

from brigade.core.pages import NOTHING_KNOWN, Known

Finish = Literal["stop", "length"]


@dataclass(eq=False, slots=True)
class Request:
    """Tokens so far and how many are done. There is no prefill or decode phase: a step advances `done`.

    Reaching the last known token yields a new one. `done` counts positions that are planned, not only computed:
    steps run in plan order, so a later step may rely on them.
    """

    rid: int
    tokens: list[int]
    """The prompt, then every token sampled and committed."""
    max_new: int
    stop_ids: frozenset[int] = frozenset()
    salt: str = ""
    """Tenants with different salts never share cached pages."""
    n_prompt: int = field(default=0, kw_only=True)
    """Of `tokens`, those that are the prompt; 0: all. The others were generated elsewhere, and count as new ones."""
    priority: int = field(default=0, kw_only=True)
    """Lower values go first."""
    done: int = 0
    begun: int = 0
    """Where it went on when it was last admitted: what the cache had of it."""
    inflight: int = 0
    """Samples planned but not committed."""
    pages: list[int] = field(default_factory=list)
    known: Known = NOTHING_KNOWN
    """How far `pages` are published."""
    n_cached: int | None = None
    """Prompt positions found in the prefix cache when the request was first admitted; None before."""
    stored: int = 0
    """Positions at its beginning that a store below memory may have. It is asked once, so this is 0 afterwards."""
    n_stored: int = 0
    """Of `n_cached`, those that came from there."""
    drafted: bool = False
    """Whether a guess was made here at what follows its last token."""

    def __post_init__(self) -> None:
        if not self.tokens or self.max_new < 1:
            raise ValueError(f"request {self.rid} needs at least one token and max_new >= 1")
        self.tokens = list(self.tokens)  # it grows, and several requests may be made from one prompt
        self.n_prompt = self.n_prompt or len(self.tokens)
        if not 0 < self.n_prompt <= len(self.tokens):
            raise ValueError(f"request {self.rid} has {len(self.tokens)} tokens, so n_prompt cannot be {self.n_prompt}")
        if self.finish:
            raise ValueError(f"request {self.rid} has ended with the tokens that it already has")

    @property
    def todo(self) -> int:
        """Positions that could run now. The last new token is never fed back, so it needs no position.

        None while drafted ones are being checked: what comes after them is not known yet.
        """
        return max(min(len(self.tokens) + self.inflight, self.most) - self.done, 0)

    @property
    def most(self) -> int:
        """Positions that it needs if no stop id ends it."""
        return self.n_prompt + self.max_new - 1

    @property
    def finish(self) -> Finish | None:
        """Why the request has ended, or None while it goes on."""
        n_new = len(self.tokens) - self.n_prompt
        if n_new and self.tokens[-1] in self.stop_ids:
            return "stop"
        return "length" if n_new >= self.max_new else None
