"""One engine behind stdin and stdout: jobs come as JSON lines, results go back the same way. Must not import an engine.

An adapter's life:
  1. The parent starts it with its Options as one JSON argument.
  2. It loads the model and writes {"ready": facts}.
  3. For each line it reads it does one job and writes one result.
  4. It ends when its stdin ends.

Jobs: {"job": "warm", "prompts": [[...], ...]}                  a short run of the same shape, not to be measured
      {"job": "decode", "prompts": [[...], ...], "n_out": 48}   all at once; greedy; exactly n_out tokens each
      {"job": "prefill", "prompts": [[...], ...]}               one after another, one token each

Whatever the engine itself prints to stdout goes to stderr, so that it cannot be taken for a result.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]

WARM_TOKENS = 4


@dataclass(frozen=True)
class Options:
    """What an adapter needs to know before it loads."""

    checkpoint: str
    venv: str
    """Folder in which the engine is installed."""
    precision: str = "bf16"
    """bf16, int8 or int4."""
    threads: int = 1
    max_concurrency: int = 1
    max_context: int = 1024
    """Positions of the longest request."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the engine's own, beyond what its adapter chooses."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Decoded:
    """How one decode job went."""

    tokens_per_second: float
    """While all requests decode: from the last one's first token to the first one's last token."""
    ttft: float
    """Seconds until the first token, median of the requests, all of which were given at once."""


class Engine(Protocol):
    """A loaded engine. Every call returns when its work is done."""

    def facts(self) -> dict[str, Any]:
        """Version and what must be known to read the numbers."""
        ...

    def warm(self, prompts: Prompts) -> None:
        """Run these shapes once, so that what is compiled or allocated at first use is not measured."""
        ...

    def decode(self, prompts: Prompts, n_out: int) -> Decoded: ...

    def prefill(self, prompts: Prompts) -> list[float]:
        """Seconds until the first token of each prompt, alone."""
        ...


def decoded(start: float, times: Sequence[Sequence[float]]) -> Decoded:
    """Numbers of requests that were given at `start`, from the moments at which each of their tokens came.

    Raises ValueError if there is no stretch in which all decode: the outputs are too short.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    if end <= begin:
        raise ValueError("the first request ended before the last one began to decode; ask for longer outputs")
    n = sum(1 for of_one in times for t in of_one if begin < t <= end)
    return Decoded(n / (end - begin), statistics.median(t[0] for t in times) - start)


def answer(load: Callable[[Options], Engine]) -> None:
    """Be the adapter process: load, then do jobs until stdin ends."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        results.write(json.dumps(value) + "\n")
        results.flush()

    engine = load(Options(**json.loads(sys.argv[1])))
    say({"ready": engine.facts()})
    for line in sys.stdin:
        say(_do(engine, json.loads(line)))


def _do(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    match job["job"]:
        case "warm":
            engine.warm(job["prompts"])
            return {"done": True}
        case "decode":
            try:
                return asdict(engine.decode(job["prompts"], job["n_out"]))
            except ValueError as e:
                return {"error": str(e)}
        case "prefill":
            return {"seconds": engine.prefill(job["prompts"])}
        case other:
            return {"error": f"unknown job {other!r}"}
