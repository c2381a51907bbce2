"""/health, /ready and /metrics: what operators and dashboards see."""

import httpx

from brigade.engine.output import Health, Timings
from brigade.serve.app import make_app
from brigade.serve.config import ServeConfig
from brigade.serve.metrics import Metrics
from tests.serve.conftest import client_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_bad_requests import error_of


def samples(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def test_metrics_show_what_the_engine_reported(engine: FakeEngine) -> None:
    metrics = Metrics()
    app = make_app(engine, ServeConfig(served_name="fox"), metrics)  # type: ignore[arg-type]
    metrics.first_token(0.2, n_prompt=10, n_cached=4, n_stored=3)
    metrics.next_token(0.03)
    metrics.next_token(0.05)
    metrics.finished(Timings(ttft=0.2, total=0.28, n_tokens=3), "stop")
    metrics.finished(Timings(ttft=0.0, total=9.0, n_tokens=0), "abort")
    metrics.restarted()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = samples(response.text)
    expected = {
        "brigade_time_to_first_token_seconds_count": 1,
        "brigade_time_to_first_token_seconds_sum": 0.2,
        "brigade_inter_token_latency_seconds_count": 2,
        "brigade_time_per_output_token_seconds_count": 1,
        "brigade_e2e_request_latency_seconds_count": 1,
        "brigade_e2e_request_latency_seconds_sum": 0.28,
        "brigade_prompt_tokens_total": 10,
        'brigade_cached_prompt_tokens_total{tier="memory"}': 1,
        'brigade_cached_prompt_tokens_total{tier="disk"}': 3,
        "brigade_generation_tokens_total": 3,
        'brigade_request_finished_total{reason="stop"}': 1,
        'brigade_request_finished_total{reason="abort"}': 1,
        'brigade_request_finished_total{reason="length"}': 0,
        'brigade_request_finished_total{reason="error"}': 0,
        "brigade_worker_restarts_total": 1,
        "brigade_num_requests_running": 0,
        "brigade_num_requests_waiting": 3,
        "brigade_kv_cache_usage_ratio": 0.25,
        "brigade_engine_ready": 1,
        "brigade_num_preemptions_total": 2,
        "brigade_steps_total": 7,
        "brigade_spec_decode_num_draft_tokens_total": 9,
        "brigade_spec_decode_num_accepted_tokens_total": 6,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert abs(found["brigade_time_per_output_token_seconds_sum"] - 0.04) < 1e-9


async def test_two_servers_in_one_process_do_not_mix_their_metrics(engine: FakeEngine) -> None:
    first, second = Metrics(), Metrics()
    first.restarted()
    assert samples(second.scrape().decode())["brigade_worker_restarts_total"] == 0


async def test_an_engine_that_cannot_answer_is_not_ready_but_alive(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        assert (await client.get("/ready")).json() == {"status": "ready"}
        engine.state = Health(False, "no step for 12 s")
        response = await client.get("/ready")
        assert error_of(response, 503)["message"] == "no step for 12 s"
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert samples((await client.get("/metrics")).text)["brigade_engine_ready"] == 0
