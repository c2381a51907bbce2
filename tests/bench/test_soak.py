"""The soak notices what it is there to notice, and its report is arithmetic on what it noticed."""

import json
import random
from typing import Any

import httpx

from bench.deployment import Metrics
from bench.soak import Soak, Wanted
from bench.soak_report import Tally, report

WANTED = [Wanted((5, 6, 7), 3, "one two three")]


class Stub:
    """A gateway whose every answer is the same."""

    def __init__(self, *events: Any, status: int = 200) -> None:
        body = b"".join(
            b"data: " + (e.encode() if isinstance(e, str) else json.dumps(e).encode()) + b"\n\n" for e in events
        )
        self._reply = httpx.MockTransport(lambda request: httpx.Response(status, content=body))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://stub", transport=self._reply)


def text(piece: str) -> dict[str, Any]:
    return {"choices": [{"text": piece}]}


class Stays(random.Random):
    """A client that neither leaves nor sends nonsense."""

    def random(self) -> float:
        return 0.5


async def asked(stub: Stub, gone: int = 0) -> Tally:
    soak: Any = Soak(stub, WANTED, 1)  # type: ignore[arg-type]
    soak.gone = gone
    await soak.asking(Stays())
    tally: Tally = soak.tally
    return tally


async def test_a_right_answer_is_no_problem() -> None:
    tally = await asked(Stub(text("one two "), text("three"), "[DONE]"))
    assert (dict(tally.ends), tally.problems) == ({"answered": 1}, [])


async def test_an_answer_that_one_rank_would_not_give_is_one() -> None:
    assert "not that of one rank" in (await asked(Stub(text("one two four"), "[DONE]"))).problems[0]
    assert "not that of one rank" in (await asked(Stub(text("one two"), "[DONE]"))).problems[0]


async def test_a_stream_that_breaks_needs_a_reason() -> None:
    assert "without an answer: broken stream" in (await asked(Stub(text("one two")))).problems[0]
    assert (await asked(Stub(text("one two")), gone=1)).problems == []
    assert "not that of one rank" in (await asked(Stub(text("one too")), gone=1)).problems[0]


async def test_refusals_are_counted_by_what_they_are() -> None:
    assert dict((await asked(Stub(status=429))).ends) == {"HTTP 429": 1}
    assert dict((await asked(Stub({"error": {"message": "lost"}}))).ends) == {"error event": 1}


def test_the_report_says_how_often_and_how_long() -> None:
    tally = Tally()
    tally.ends.update({"answered": 9, "HTTP 429": 1})
    tally.faults["kill"] = 3
    tally.recovered["kill"] = [3.0, 1.0, 2.0]
    tally.sizes["gateway", 1] = [(100.0, 10), (150.0, 11), (101.5, 12)]
    said = report(tally, "a test")
    for line in "| all | 10 |", "| kill | 3 | 2.00 | 3.00 |", "a gateway: +1.5 MiB, +2 open files", "happened: 0":
        assert line in said


def test_what_is_held_is_found_in_the_metrics() -> None:
    lines = ['brigade_kv_pages_held{state="running"} 0.0', 'brigade_kv_pages_held{state="offered"} 2.0']
    metrics = Metrics("\n".join([*lines, "brigade_num_requests_running 0.0", "brigade_steps_total 7.0"]))
    assert metrics.held == {'brigade_kv_pages_held{state="offered"}': 2.0}
    assert metrics.sum("steps_total") == 7
