"""GET /debug/units and the metrics of ranks: what operators see of units and of the last minute."""

from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

from brigade.engine.output import Health, Timings
from brigade.serve import units
from brigade.serve.metrics import Metrics
from brigade.serve.units import Percentiles, Recent
from tests.serve.conftest import CHAT
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_metrics import samples


async def test_it_tells_units_in_the_shape_described(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.state = Health(False, "no step for 12 s")
    got: dict[str, Any] = (await client.get("/debug/units")).json()
    described = (await client.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/ServerReport", "components": described["components"]}
    Draft202012Validator(schema).validate(got)
    assert (got["model"], got["ready"], got["reason"]) == ("fox", False, "no step for 12 s")
    assert got["handovers"] == {"states": {"decoding": 0}, "fetched": 2, "computed": 0, "seconds": 0.5}
    unit = got["units"][0]
    assert (unit["name"], unit["role"], unit["state"], unit["restarts"]) == ("mixed-0", "mixed", "not ready", 1)
    assert unit["ranks"][0] == {
        "rank": 0,
        "running": 0,
        "waiting": 3,
        "kv_pages": 40,
        "kv_pages_used": 10,
        "kv_pages_reserved": 0,
        "kv_pages_offered": 0,
        "steps": 7,
        "preemptions": 2,
    }


async def test_the_metrics_have_each_rank_and_the_hit_rate(client: httpx.AsyncClient) -> None:
    found = samples((await client.get("/metrics")).text)
    assert found['brigade_rank_requests_waiting{rank="0",role="mixed",unit="mixed-0"}'] == 3
    assert found['brigade_rank_kv_pages{rank="0",role="mixed",unit="mixed-0"}'] == 40
    assert found["brigade_prefix_cache_hit_ratio"] == 0


def test_requests_that_were_heard_are_in_the_report(engine: FakeEngine) -> None:
    metrics = Metrics()
    metrics.first_token(0.2, n_prompt=10, n_cached=4, n_stored=1)
    metrics.next_token(0.1)
    metrics.finished(Timings(0.2, 0.3, 2), "length")
    report = metrics.report(engine, "fox")  # type: ignore[arg-type]
    assert (report.prompt_tokens, report.cached_prompt_tokens, report.generation_tokens) == (10, 4, 2)
    assert report.ttft == Percentiles(1, 0.2, 0.2)
    assert report.tpot.p99 == pytest.approx(0.1)
    assert report.finished["length"] == 1


def test_percentiles_are_of_the_last_minute_and_of_no_more_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(units.time, "monotonic", lambda: now)
    recent = Recent()
    assert recent.percentiles() == Percentiles(0, None, None)
    for value in range(2000):
        recent.add(float(value))
    assert recent.percentiles() == Percentiles(1024, 976 + 512.0, 976 + 1013.0)
    now += units.RECENT_SECONDS + 1
    recent.add(7.0)
    assert recent.percentiles() == Percentiles(1, 7.0, 7.0)


async def test_it_is_behind_the_same_door_as_all_else(client: httpx.AsyncClient) -> None:
    assert (await client.get("/debug/units", headers={"host": "evil.example"})).status_code == 403
    assert (await client.post("/debug/units", json=CHAT)).status_code == 405
