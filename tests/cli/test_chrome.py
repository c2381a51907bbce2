"""A recording as a Chrome trace: the format that viewers read, spans that nest, one request's way over all ranks."""

from collections import defaultdict
from typing import Any

import pytest

from brigade.cli.chrome import chrome_trace, of_rank, of_request, shares
from brigade.engine.messages import Ran
from brigade.engine.recorder import RankSpans
from brigade.serve.tracer import Recording, RequestSpans, UnitSpans

AHEAD = 10**12
"""The decode rank's clock is so many nanoseconds ahead."""


def part(name: str, begin: int, end: int, layer: int = -1) -> tuple[str, int, int, int, int]:
    return name, begin, end, layer, 0


def some_recording() -> Recording:
    """Request 0 of client "mine" is number 10 on the prefill rank and 11 on the decode rank; there is another one."""
    gateway = [
        part("read", 1000, 2000),
        part("submit", 2000, 3000),
        part("wait", 3000, 9000),
        part("stream", 9000, 9500),
    ]
    requests = [
        RequestSpans("mine", [0], 1000, 30000, gateway),
        RequestSpans("chatcmpl-2", [1], 1500, 0, [part("read", 1500, 1600)]),
    ]
    prefill = RankSpans(
        0,
        steps=[Ran(4000, 8000, 1, [(10, 0, 19), (12, 0, 5)]), Ran(8100, 8200, 1, [(12, 5, 1)])],
        parts=[part("attention", 4100, 5000, 0), part("experts", 5000, 7900, 0), part("head", 8110, 8190)],
        turns=[
            *(part("schedule", 3500, 3600), part("schedule", 3800, 3900), part("agree", 3900, 3950)),
            *(part("commit", 8000, 8050), part("schedule", 8050, 8060), part("commit", 8200, 8210)),
        ],
        n_lost=3,
    )
    decode = RankSpans(
        0,
        steps=[Ran(AHEAD + 20000, AHEAD + 25000, 1, [(11, 19, 1)])],
        parts=[part("attention", AHEAD + 20100, AHEAD + 24000, 0)],
        turns=[part("transfer", AHEAD + 9000, AHEAD + 19000, 11), part("transfer", AHEAD + 9500, AHEAD + 18000, 13)],
        offset=AHEAD,
        uncertain=50,
    )
    silent = RankSpans(1, problem="it has not told its spans within 15 s")
    moved = [(0, "routed", 2500), (0, "prefilling", 3500), (0, "transferring", 8500), (0, "decoding", 19500)]
    units = [UnitSpans("prefill-0", "prefill", 0, [prefill]), UnitSpans("decode-0", "decode", 2, [decode, silent])]
    return Recording(500, 40000, requests, [(0, 10), (0, 11), (1, 12)], moved, units)


def check_format(trace: dict[str, Any]) -> None:
    """The trace event format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
    assert set(trace) == {"displayTimeUnit", "traceEvents", "otherData"}
    named, used = set(), set()
    threads = defaultdict(list)
    open_ = set()
    for e in trace["traceEvents"]:
        assert isinstance(e["pid"], int)
        assert isinstance(e["tid"], int)
        assert isinstance(e["name"], str)
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "thread_name", "process_sort_index", "thread_sort_index")
            named |= {(e["pid"], e["tid"])} if e["name"] == "thread_name" else {e["pid"]}
            continue
        used |= {e["pid"], (e["pid"], e["tid"])}
        assert isinstance(e["ts"], float)
        match e["ph"]:
            case "X":
                assert e["dur"] >= 0
                threads[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
            case "b":
                open_.add((e["cat"], e["id"]))
            case "e":
                open_.remove((e["cat"], e["id"]))
            case "s" | "t" | "f":
                assert e["id"] > 0
                assert e["cat"] == "request"
            case other:
                raise AssertionError(f"phase {other}")
    assert used <= named, "every process and thread that has events has a name"
    assert not open_, "every asynchronous event ends"
    for spans in threads.values():
        stack: list[float] = []
        for begin, end in sorted(spans, key=lambda s: (s[0], -s[1])):
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1] + 1e-6, "spans of a thread nest"
            stack.append(end)


def spans(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] == name]


def test_it_is_the_format_that_viewers_read() -> None:
    whole = some_recording()
    for recording in (whole, of_request(whole, "mine"), of_rank(whole, "decode-0", 0)):
        check_format(chrome_trace(recording))


def test_times_are_microseconds_since_the_beginning_on_the_gateways_clock() -> None:
    trace = chrome_trace(some_recording())
    (request,) = [e for e in spans(trace, "request") if e["args"]["rids"] == [0]]
    assert (request["ts"], request["dur"]) == (0.5, 29.0)
    (step,) = [e for e in spans(trace, "step of 1 token") if "mine" in e["args"]["requests"]]
    assert (step["ts"], step["dur"]) == (19.5, 5.0)


def test_one_request_can_be_followed_from_the_gateway_over_both_ranks_and_back() -> None:
    trace = chrome_trace(some_recording())
    flow = [(e["ph"], e["pid"], e["ts"]) for e in trace["traceEvents"] if e["ph"] in "stf" and e["id"] == 1]
    assert sorted(flow, key=lambda e: e[2]) == [("s", 1, 0.5), ("t", 2, 3.5), ("t", 3, 19.5), ("f", 1, 29.5)]
    (step,) = spans(trace, "step of 24 tokens")
    assert step["args"]["requests"] == {"mine": 19, "chatcmpl-2": 5}
    states = {name: spans(trace, name)[0]["ts"] for name in ("routed", "prefilling", "transferring", "decoding")}
    assert states == {"routed": 2.0, "prefilling": 3.0, "transferring": 8.0, "decoding": 19.0}
    (transfer,) = [e for e in trace["traceEvents"] if e["ph"] == "b" and e["args"]["request"] == "mine"]
    assert transfer["ts"] == 8.5


def test_of_one_request_only_its_steps_are_there() -> None:
    recording = of_request(some_recording(), "mine")
    trace = chrome_trace(recording)
    assert not spans(trace, "head")
    for name, at in ("schedule", 3.3), ("agree", 3.4), ("commit", 7.5):
        assert [e["ts"] for e in spans(trace, name)] == [at], "what the loop did for other steps is not there"
    assert len(spans(trace, "request")) == 1
    assert [e["args"]["layer"] for e in spans(trace, "experts")] == [0]
    assert shares(recording) == [("attention", 2, 4.8e-6), ("experts", 1, 2.9e-6)]


def test_of_one_rank_or_unit_the_others_are_not_there() -> None:
    def processes(unit: str, rank: int | None) -> list[str]:
        events = chrome_trace(of_rank(some_recording(), unit, rank))["traceEvents"]
        return [e["args"]["name"] for e in events if e["name"] == "process_name"]

    assert processes("decode-0", 0) == ["gateway", "decode-0 rank 0 (decode)"]
    assert processes("decode-0", None) == ["gateway", "decode-0 rank 0 (decode)", "decode-0 rank 1 (decode)"]
    for unit, rank in ("decode-0", 2), ("mixed-0", None):
        with pytest.raises(ValueError, match="prefill-0 with 1, decode-0 with 2"):
            of_rank(some_recording(), unit, rank)


def test_what_is_missing_and_whose_clock_differs_is_noted() -> None:
    notes = chrome_trace(some_recording())["otherData"]["notes"]
    assert any("prefill-0 rank 0" in n and "first 3 spans" in n for n in notes)
    assert any("decode-0: processes were replaced meanwhile (2)" in n for n in notes)
    assert any("decode-0 rank 1" in n and "not told its spans" in n for n in notes)
    assert any("decode-0 rank 0" in n and "1000000.000 ms ahead" in n for n in notes)


def test_parts_are_summed_over_ranks_the_longest_first() -> None:
    assert shares(some_recording()) == [("attention", 2, 4.8e-6), ("experts", 1, 2.9e-6), ("head", 1, 8e-8)]
