"""What a load test sends and what its numbers mean. Pure: no sockets, no clock, no printing.

Definitions, all in seconds:
  E2E   from the moment a request was due until its stream ended. Due is the arrival time in an open loop, whether or
        not the generator was on time, so slow answers cannot hide the wait they cause (coordinated omission).
  TTFT  from due until the first event with text.
  TPOT  (last event with text - first) / (output tokens - 1), for answers of two tokens or more.
  ITL   each gap between two events with text.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brigade.cli.fault import Fault

PERCENTILES = (50, 90, 99)
LOWEST_ID = 100
"""Synthetic prompts use token ids from here on: the first ids of most vocabularies are control tokens and bytes."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to make: the path below the server's address, and the body without the model's name."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds on one clock whose zero does not matter."""

    due: float
    end: float
    marks: tuple[float, ...] = ()
    """When each event with text arrived."""
    n_in: int = 0
    n_out: int = 0
    n_cached: int = 0
    failure: str = ""
    """Kind of failure, such as "HTTP 429"; empty for a complete answer."""
    detail: str = ""
    late: float = 0.0
    """How long after `due` it was sent: large values mean that the generator was the bottleneck."""

    @property
    def e2e(self) -> float:
        return self.end - self.due

    @property
    def ttft(self) -> float | None:
        return self.marks[0] - self.due if self.marks else None

    @property
    def tpot(self) -> float | None:
        return (self.marks[-1] - self.marks[0]) / (self.n_out - 1) if self.marks and self.n_out > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def synthetic(n: int, input_len: int, output_len: int, vocab: int, seed: int) -> list[Call]:
    """`n` completions of `input_len` random token ids from [100, vocab) that run to exactly `output_len` tokens."""
    draw = random.Random(f"prompts {seed}")
    return [
        Call("/v1/completions", _body([draw.randrange(LOWEST_ID, vocab) for _ in range(input_len)], output_len))
        for _ in range(n)
    ]


def _body(ids: list[int], output_len: int) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}


def read_calls(path: Path, output_len: int) -> list[Call]:
    """One Call for each line of a JSONL file. Raises Fault (bad input) naming the file and the line.

    Shapes: {"prompt": str}, {"messages": [...]}, {"turns": [str, ...]} (its first turn is asked: later ones would need
    the answers), {"question": str}; each with an optional "max_tokens" (else `output_len`). Other keys are data about
    the prompt and are not sent.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise Fault(f"{path}: cannot be read ({e.strerror})", 2) from e
    except UnicodeDecodeError as e:
        raise Fault(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start})", 2) from e
    calls = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            calls.append(_call(json.loads(line), output_len))
        except (ValueError, RecursionError) as e:
            raise Fault(f"{path}, line {number}: {e}", 2) from e
    if not calls:
        raise Fault(f"{path}: holds no prompts", 2)
    return calls


def _call(line: Any, output_len: int) -> Call:
    if not isinstance(line, dict):
        raise ValueError("must be a JSON object")
    max_tokens = line.get("max_tokens", output_len)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ValueError(f"'max_tokens' must be a whole number of at least 1, not {max_tokens!r}")
    shapes = [key for key in ("prompt", "messages", "turns", "question") if key in line]
    if len(shapes) != 1:
        raise ValueError(f"must hold one of 'prompt', 'messages', 'turns' and 'question', not {shapes or 'none'}")
    content = line[shapes[0]]
    if shapes[0] == "prompt":
        return Call("/v1/completions", {"prompt": _nonempty("prompt", content), "max_tokens": max_tokens})
    if shapes[0] == "question":
        messages = [{"role": "user", "content": _nonempty("question", content)}]
    elif shapes[0] == "turns":
        if not isinstance(content, list) or not content:
            raise ValueError("'turns' must be a list with at least one text")
        messages = [{"role": "user", "content": _nonempty("turns", content[0])}]
    else:
        if (
            not isinstance(content, list)
            or not content
            or not all(isinstance(m, dict) and "role" in m for m in content)
        ):
            raise ValueError("'messages' must be a list of objects with a 'role'")
        messages = content
    return Call("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens})


def _nonempty(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"'{name}' must be text that is not empty")
    return value


def repeat(calls: Sequence[Call], n: int) -> list[Call]:
    """The first `n` calls, starting over when they run out."""
    return [calls[i % len(calls)] for i in range(n)]


def arrivals(n: int, rate: float, seed: int) -> list[float]:
    """`n` arrival times in seconds of a Poisson process with `rate` a second; the first arrives at 0."""
    draw, at, times = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(n):
        times.append(at)
        at += draw.expovariate(rate)
    return times


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation between the closest ranks, as numpy's default does.

    With n sorted values, position (n - 1) * q / 100 is read; between two values the straight line counts. Raises
    ValueError without values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(values: Sequence[float]) -> dict[str, float | int] | None:
    """Count, percentiles and mean, or None where there is nothing to summarise."""
    if not values:
        return None
    return {
        "n": len(values),
        **{f"p{q}": percentile(values, q) for q in PERCENTILES},
        "mean": sum(values) / len(values),
    }


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one run. Latency and tokens are of complete answers; failures are counted by kind.

    The run lasts from the first due time to the last end, of failed requests too.
    """
    good = [o for o in outcomes if not o.failure]
    bad = [o for o in outcomes if o.failure]
    seconds = max((o.end for o in outcomes), default=0.0) - min((o.due for o in outcomes), default=0.0)
    n_in, n_out = sum(o.n_in for o in good), sum(o.n_out for o in good)
    return {
        "requests": len(outcomes),
        "completed": len(good),
        "failed": len(bad),
        "failures": dict(Counter(o.failure for o in bad).most_common()),
        "first_error": min(bad, key=lambda o: o.end).detail if bad else None,
        "seconds": seconds,
        "requests_per_second": _rate(len(good), seconds),
        "input_tokens": n_in,
        "cached_input_tokens": sum(o.n_cached for o in good),
        "output_tokens": n_out,
        "input_tokens_per_second": _rate(n_in, seconds),
        "output_tokens_per_second": _rate(n_out, seconds),
        "output_tokens_per_answer": _rate(n_out, len(good)),
        "ttft": summary([o.ttft for o in good if o.ttft is not None]),
        "tpot": summary([o.tpot for o in good if o.tpot is not None]),
        "itl": summary([gap for o in good for gap in o.gaps]),
        "e2e": summary([o.e2e for o in good]),
        "max_late": max((o.late for o in outcomes), default=0.0),
    }


def _rate(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0
