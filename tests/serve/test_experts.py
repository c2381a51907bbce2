"""GET /debug/experts: what operators see of the experts' loads."""

from typing import Any

import httpx
from jsonschema_rs import Draft202012Validator

from brigade.engine.output import Unavailable
from tests.serve.fake_engine import FakeEngine


async def test_it_tells_loads_and_places_in_the_shape_described(client: httpx.AsyncClient) -> None:
    got: dict[str, Any] = (await client.get("/debug/experts")).json()
    described = (await client.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/Experts", "components": described["components"]}
    Draft202012Validator(schema).validate(got)
    [unit] = got["units"]
    assert (unit["unit"], unit["problem"]) == ("mixed-0", "")
    got = unit["loads"]
    assert (got["busiest_over_mean_before"], got["busiest_over_mean"]) == (1.5, 1.17)
    assert got["layers"][0]["slots"] == [0, 1, 2, 3, 4, 5, 0]
    assert got["rank_of_slot"] == [0, 0, 0, 1, 1, 1, 1]
    assert got["moved"] == {"experts": 3, "portions": 1, "dropped": 0, "last": "2026-11-25T08:00:00+00:00"}


async def test_a_dense_model_has_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.loads = []
    answer = await client.get("/debug/experts")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_experts"


async def test_while_the_unit_is_not_whole_it_says_when_to_come_back(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.loads = Unavailable("the worker is being restarted")
    answer = await client.get("/debug/experts")
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
