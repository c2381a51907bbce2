"""Who asks when: real traces of requests, or users who ask again as soon as they are answered. Pure; seeded.

Formats of traces, told apart by their first line:

    Mooncake    JSON lines with timestamp (ms), input_length, output_length, hash_ids (blocks of 512 prompt tokens)
    Azure       CSV with TIMESTAMP, ContextTokens, GeneratedTokens
    ServeGen    CSV with timestamp_s, input_tokens, output_tokens
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import resources
from itertools import count
from pathlib import Path
from random import Random

BLOCK = 512
"""Prompt tokens of one id in Mooncake's traces."""
MOST_REQUESTS = 100_000
MOST_TOKENS = 1_000_000


class BadTrace(ValueError):
    """A trace that cannot be read. The message names the file, the line and the field."""


@dataclass(frozen=True)
class Arrival:
    """One request."""

    at: float
    """Seconds after the beginning."""
    n_in: int
    n_out: int
    blocks: tuple[int, ...] = ()
    """What each BLOCK of its prompt holds: equal prefixes may be found in a cache. Empty: like no other's."""

    def prompt(self, rid: int) -> list[int]:
        """Tokens that are equal exactly where another request's are known to be."""
        known = [token for block in self.blocks for token in [block] * BLOCK][: self.n_in]
        return known + [-1 - rid] * (self.n_in - len(known))


@dataclass(frozen=True)
class Users:
    """Users who send the next request when the last one is answered; each has a prefix of its own that it repeats."""

    n: int
    n_in: int
    n_out: int
    hit: float = 0.0
    over: float = 30.0
    """Seconds over which they begin."""
    vary: float = 0.0
    """Lengths are even between (1 - vary) and (1 + vary) times the given ones."""

    def first(self, random: Random) -> Iterator[Arrival]:
        for user in range(self.n):
            yield self.next(user, random.random() * self.over, random)

    def next(self, user: int, at: float, random: Random) -> Arrival:
        """The user's next request."""

        def length(mean: int) -> int:
            return max(1, round(mean * (1 + self.vary * (2 * random.random() - 1))))

        n_in = length(self.n_in)
        return Arrival(at, n_in, length(self.n_out), (user,) * round(n_in * self.hit / BLOCK))


def read_trace(path: Path | None) -> list[Arrival]:
    """A trace from a file, or the shipped one (Mooncake's conversations). Raises BadTrace."""
    where = str(path or "data/arrivals.jsonl")
    try:
        if path is None:
            text = (resources.files("brigade.plan") / "data/arrivals.jsonl").read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise BadTrace(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise BadTrace(f"{path}: not a text file") from e
    lines = text.splitlines()
    if not lines:
        raise BadTrace(f"{where}: is empty")
    rows = _json_rows(lines, where) if lines[0].startswith("{") else _csv_rows(lines, where)
    found = [row for row, _ in zip(rows, range(MOST_REQUESTS), strict=False)]
    if not found:
        raise BadTrace(f"{where}: holds no requests")
    begin = min(a.at for a in found)
    return sorted((replace(a, at=a.at - begin) for a in found), key=lambda a: a.at)


def _json_rows(lines: Sequence[str], where: str) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(x) for x in row.get("hash_ids", ()))
            yield _checked(float(row["timestamp"]) / 1e3, row["input_length"], row["output_length"], blocks)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise BadTrace(f"{where}, line {number}: not a request ({e!r})") from e


AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SERVEGEN = ("timestamp_s", "input_tokens", "output_tokens")


def _csv_rows(lines: Sequence[str], where: str) -> Iterator[Arrival]:
    rows = csv.DictReader(lines)
    names = rows.fieldnames or ()
    kinds: tuple[tuple[tuple[str, str, str], Callable[[str], float]], ...] = ((AZURE, _clock), (SERVEGEN, float))
    kind = next(((keys, time) for keys, time in kinds if set(keys) <= set(names)), None)
    if kind is None:
        raise BadTrace(f"{where}: neither JSON lines nor a CSV with {', '.join(AZURE)} or {', '.join(SERVEGEN)}")
    (at, n_in, n_out), time = kind
    for number, row in enumerate(rows, 2):
        try:
            yield _checked(time(row[at]), row[n_in], row[n_out], ())
        except (ValueError, TypeError, OverflowError) as e:
            raise BadTrace(f"{where}, line {number}: not a request ({e})") from e


def _clock(text: str) -> float:
    return datetime.fromisoformat(text[:26]).timestamp()


def _checked(at: float, n_in: str | int, n_out: str | int, blocks: tuple[int, ...]) -> Arrival:
    a = Arrival(at, int(n_in), max(1, int(n_out)), blocks)
    if not 0 <= a.at < 1e11 or not 1 <= a.n_in <= MOST_TOKENS or a.n_out > MOST_TOKENS:
        raise ValueError(f"time or lengths are out of bounds: {a.at}, {a.n_in}, {a.n_out}")
    return a


def at_rate(trace: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """The trace with its pauses stretched or squeezed to `rate` requests/s on average, repeated to fill `seconds`."""
    span = max(trace[-1].at, 1e-9) * len(trace) / max(1, len(trace) - 1)
    scale = len(trace) / span / rate
    out: list[Arrival] = []
    for lap in count():
        for a in trace:
            at = (a.at + lap * span) * scale
            if at > seconds:
                return out
            out.append(replace(a, at=at))
    raise AssertionError("unreachable")


def means(trace: Sequence[Arrival]) -> Mapping[str, float]:
    """Mean lengths of a trace."""
    return {"n_in": sum(a.n_in for a in trace) / len(trace), "n_out": sum(a.n_out for a in trace) / len(trace)}
