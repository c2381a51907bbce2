"""What every engine is asked to do, and with which prompts. Must not run anything."""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill", "http"]
LOWEST_ID = 100
"""The first ids of most vocabularies are control tokens and bytes."""


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    kind: Kind
    size: int
    """Concurrency of decode and http, prompt tokens of prefill."""

    @property
    def name(self) -> str:
        return {"decode": "decode, {} at once", "prefill": "prefill of {}", "http": "HTTP, {} at once"}[
            self.kind
        ].format(self.size)


@dataclass(frozen=True)
class Lengths:
    """Tokens of the decode and HTTP workloads."""

    n_in: int = 128
    n_out: int = 48

    @property
    def context(self) -> int:
        """Positions behind a token of the decode phase, on average."""
        return self.n_in + self.n_out // 2


def prompts(seed: str, n: int, length: int, vocab: int) -> list[list[int]]:
    """`n` prompts of random ids, equal for equal seeds, and all different, so that no prefix cache can help."""
    draw = random.Random(seed)
    return [[draw.randrange(LOWEST_ID, vocab) for _ in range(length)] for _ in range(n)]
