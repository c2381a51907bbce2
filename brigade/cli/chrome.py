"""A recording of POST /debug/trace as a trace that ui.perfetto.dev and chrome://tracing show. Pure.

Chrome's trace event format, JSON object form: complete events (ph X) with ts and dur in microseconds, which nest within
a thread; metadata (M) names processes and threads; flows (s, t, f) draw one request's way from the gateway over the
steps of all ranks and back; transfers overlap, so they are asynchronous (b, e). Ranks are processes with two threads:
what runs steps, and the loop between them. The gateway has two threads for each request: what it did for it, and where
the request was.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from brigade.core.laps import Lap

if TYPE_CHECKING:
    from brigade.engine.messages import Ran
    from brigade.engine.recorder import RankSpans
    from brigade.serve.tracer import Recording, RequestSpans

Event = dict[str, Any]
GATEWAY = 1
"""Its pid; those of ranks follow."""
MODEL, LOOP, LINK = 1, 2, 3
"""Threads of a rank."""
TRANSFER, COMMIT = "transfer", "commit"


class Clock:
    """Microseconds since the beginning of the recording, from nanoseconds of a host."""

    def __init__(self, began: int, offset: int = 0) -> None:
        self._zero = began + offset

    def at(self, ns: int) -> float:
        return (ns - self._zero) / 1e3

    def span(self, name: str, begin: int, end: int, pid: int, tid: int, **args: Any) -> Event:
        """A complete event."""
        at = self.at(begin)
        return {"ph": "X", "name": name, "ts": at, "dur": self.at(end) - at, "pid": pid, "tid": tid, "args": args}


def of_request(recording: "Recording", name: str) -> "Recording":
    """What was done for this one request alone, and the steps that had it."""
    requests = [r for r in recording.requests if r.name == name]
    names = _names(recording, requests)
    units = [replace(unit, ranks=[_of_request(rank, names) for rank in unit.ranks]) for unit in recording.units]
    return replace(recording, requests=requests, units=units)


def _of_request(rank: "RankSpans", names: dict[int, tuple[str, int]]) -> "RankSpans":
    steps = [s for s in rank.steps if any(rid in names for rid, _, _ in s.slices)]
    parts = list(_within(rank.parts, [(s.begin, s.end) for s in steps]))
    transfers = [t for t in rank.turns if t[0] == TRANSFER and t[3] in names]
    return replace(rank, steps=steps, parts=parts, turns=[*_turns(rank.turns, steps), *transfers])


def _turns(turns: Sequence[Lap], steps: "Sequence[Ran]") -> list[Lap]:
    """What the loop did for these steps: of each kind the last before a step, and the commit after it."""
    kept: dict[Lap, None] = {}
    for name in dict.fromkeys(t[0] for t in turns if t[0] != TRANSFER):
        laps = [t for t in turns if t[0] == name]
        begins, ends = [begin for _, begin, *_ in laps], [end for _, _, end, *_ in laps]
        for step in steps:
            at = bisect_left(begins, step.end) if name == COMMIT else bisect_right(ends, step.begin) - 1
            if 0 <= at < len(laps):
                kept[laps[at]] = None
    return list(kept)


def of_rank(recording: "Recording", unit: str, rank: int | None) -> "Recording":
    """What one rank did, or all of a unit, beside the gateway. Raises ValueError, saying which there are."""
    ranks = [r for u in recording.units if u.name == unit for r in u.ranks if rank in (None, r.rank)]
    if not ranks:
        there = ", ".join(f"{u.name} with {len(u.ranks)}" for u in recording.units)
        raise ValueError(f"there is no such rank; units and their ranks are {there}")
    return replace(recording, units=[replace(u, ranks=ranks) for u in recording.units if u.name == unit])


def chrome_trace(recording: "Recording") -> Event:
    """The whole trace."""
    requests, names = recording.requests, _names(recording, recording.requests)
    events = list(_gateway(recording, requests))
    notes = []
    pid = GATEWAY
    for unit in recording.units:
        if unit.restarts:
            notes.append(
                f"{unit.name}: processes were replaced meanwhile ({unit.restarts}); what they recorded is lost"
            )
        for rank in unit.ranks:
            pid += 1
            name = f"{unit.name} rank {rank.rank} ({unit.role})"
            events += _name(pid, 0, "process_name", name)
            events += _rank(rank, pid, Clock(recording.began, rank.offset), names)
            if rank.problem:
                notes.append(f"{name}: {rank.problem}")
            if rank.n_lost:
                notes.append(f"{name}: its first {rank.n_lost} spans are missing, there was no room for more")
            if rank.offset:
                off, sure = rank.offset / 1e6, rank.uncertain / 1e6
                notes.append(f"{name}: its clock was {off:.3f} ms ahead, give or take {sure:.3f} ms")
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"notes": notes}}


def shares(recording: "Recording") -> list[tuple[str, int, float]]:
    """What the steps of all ranks were made of: name, how often, seconds; the longest first."""
    n, seconds = Counter[str](), Counter[str]()
    for unit in recording.units:
        for rank in unit.ranks:
            for name, begin, end, *_ in rank.parts:
                n[name] += 1
                seconds[name] += end - begin
    return [(name, n[name], ns / 1e9) for name, ns in seconds.most_common()]


def _names(recording: "Recording", requests: "Sequence[RequestSpans]") -> dict[int, tuple[str, int]]:
    """What ranks call a request -> its name and the number of its flow."""
    names = {rid: (r.name, flow) for flow, r in enumerate(requests, 1) for rid in r.rids}
    return names | {part: names[rid] for rid, part in recording.placed if rid in names}


def _gateway(recording: "Recording", requests: "Sequence[RequestSpans]") -> Iterator[Event]:
    clock = Clock(recording.began)
    yield from _name(GATEWAY, 0, "process_name", "gateway")
    for flow, r in enumerate(requests, 1):
        does, stands = 2 * flow - 1, 2 * flow
        ended = r.ended or max([recording.ended, *(end for _, _, end, *_ in r.parts)])
        yield from _name(GATEWAY, does, "thread_name", r.name)
        yield from _name(GATEWAY, stands, "thread_name", f"{r.name}: where it is")
        yield clock.span("request", r.began, ended, GATEWAY, does, rids=r.rids)
        for name, begin, end, *_ in r.parts:
            yield clock.span(name, begin, end, GATEWAY, does)
        for name, begin, end in _stands(recording, r, ended):
            yield clock.span(name, begin, end, GATEWAY, stands)
        yield _flow("s", flow, clock.at(r.began), GATEWAY, does)
        yield _flow("f", flow, clock.at(ended), GATEWAY, does)


def _stands(recording: "Recording", r: "RequestSpans", ended: int) -> Iterator[tuple[str, int, int]]:
    """Where a request's first choice was: the states of its hand-over."""
    moved = [(state, at) for rid, state, at in recording.moved if rid in r.rids[:1]]
    for (state, at), (_, end) in pairwise([*moved, ("ended", ended)]):
        if state != "ended":
            yield state, at, max(at, end)


def _rank(rank: "RankSpans", pid: int, clock: Clock, names: dict[int, tuple[str, int]]) -> Iterator[Event]:
    for tid, name in (MODEL, "model"), (LOOP, "loop"), (LINK, "link"):
        yield from _name(pid, tid, "thread_name", name)
    for step in rank.steps:
        has = {names[rid][0] if rid in names else f"request {rid}": n for rid, _, n in step.slices}
        n = sum(has.values())
        title = f"step of {n} token{'' if n == 1 else 's'}"
        yield clock.span(title, step.begin, step.end, pid, MODEL, requests=has, micro_batches=step.micro_batches)
        for flow in sorted({names[rid][1] for rid, _, _ in step.slices if rid in names}):
            yield _flow("t", flow, clock.at(step.begin), pid, MODEL)
    for name, begin, end, layer, lane in rank.parts:
        args = {"layer": layer, "micro_batch": lane} if layer >= 0 else {}
        yield clock.span(name, begin, end, pid, MODEL, **args)
    for name, begin, end, rid, _ in rank.turns:
        if name != TRANSFER:
            yield clock.span(name, begin, end, pid, LOOP)
            continue
        here = {"cat": TRANSFER, "name": TRANSFER, "id": rid, "pid": pid, "tid": LINK}
        yield {**here, "ph": "b", "ts": clock.at(begin), "args": {"request": names.get(rid, (str(rid),))[0]}}
        yield {**here, "ph": "e", "ts": clock.at(end)}


def _within(parts: Sequence[Lap], spans: Sequence[tuple[int, int]]) -> Iterator[Lap]:
    """Parts that lie in one of the spans, which are in order and do not overlap."""
    ends = [end for _, end in spans]
    for part in parts:
        at = bisect_left(ends, part[2])
        if at < len(spans) and part[1] >= spans[at][0]:
            yield part


def _flow(phase: str, flow: int, ts: float, pid: int, tid: int) -> Event:
    event = {"ph": phase, "cat": "request", "name": "request", "id": flow, "ts": ts, "pid": pid, "tid": tid}
    return {**event, "bp": "e"} if phase == "f" else event


def _name(pid: int, tid: int, kind: str, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
    yield {
        "ph": "M",
        "name": kind.replace("_name", "_sort_index"),
        "pid": pid,
        "tid": tid,
        "args": {"sort_index": tid or pid},
    }
