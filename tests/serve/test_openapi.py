"""/openapi.json tells the truth: about every route, every field and every answer."""

from typing import Any

import httpx
import pytest
from jsonschema_rs import Draft202012Validator

from brigade.engine.output import QueueFull, Unavailable
from brigade.serve.app import make_app
from brigade.serve.config import ServeConfig
from brigade.serve.metrics import Metrics
from brigade.serve.schema import ChatRequest, CompletionRequest
from tests.serve.conftest import CHAT, COMPLETION, client_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_answers import events_of


@pytest.fixture
async def described(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("/openapi.json")).json())


def check(described: dict[str, Any], name: str, value: object) -> None:
    """Fails unless `value` has the shape that the description gives `name`."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    Draft202012Validator(schema).validate(value)


def test_every_route_is_described_and_nothing_else(engine: FakeEngine) -> None:
    app = make_app(engine, ServeConfig(served_name="fox"), Metrics())  # type: ignore[arg-type]
    there = {(path, method.lower()) for path, methods in app.table.items() for method in methods}
    paths = app.openapi()["paths"]
    assert {(path, method) for path, item in paths.items() for method in item} == there - {("/openapi.json", "get")}


async def test_every_field_is_described(described: dict[str, Any]) -> None:
    for kind in (ChatRequest, CompletionRequest):
        schema = described["components"]["schemas"][kind.__name__]
        assert set(schema["properties"]) == set(kind.model_fields)
        assert schema["additionalProperties"] is False
        assert schema["properties"]["model"]["enum"] == ["fox"]


async def test_every_answer_has_the_shape_described(
    client: httpx.AsyncClient, engine: FakeEngine, described: dict[str, Any]
) -> None:
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    chat, text = {**CHAT, "logprobs": True, "top_logprobs": 2}, {**COMPLETION, "logprobs": 2}
    for path, body, name in (
        ("/v1/chat/completions", CHAT, "ChatCompletion"),
        ("/v1/chat/completions", chat, "ChatCompletion"),
        ("/v1/completions", COMPLETION, "Completion"),
        ("/v1/completions", text, "Completion"),
    ):
        check(described, name, (await client.post(path, json=body)).json())
    for event in events_of(await client.post("/v1/chat/completions", json={**chat, **extra})):
        check(described, "ChatChunk", event)
    for event in events_of(await client.post("/v1/completions", json={**text, **extra})):
        check(described, "Completion", event)
    for path, name in (("/v1/models", "ModelList"), ("/v1/models/fox", "Model"), ("/health", "Status")):
        check(described, name, (await client.get(path)).json())
    engine.refusals = [QueueFull("full", 1), Unavailable("gone")]
    for _ in range(3):
        check(described, "ErrorReply", (await client.post("/v1/completions", json={**COMPLETION, "n": 999})).json())


async def test_good_requests_fit_the_description(described: dict[str, Any]) -> None:
    check(described, "ChatRequest", CHAT)
    check(described, "CompletionRequest", COMPLETION)


async def test_the_key_is_described_where_one_is_asked_for(engine: FakeEngine, described: dict[str, Any]) -> None:
    assert "securitySchemes" not in described["components"]
    async with client_of(engine, api_key="long-enough") as client:
        found = (await client.get("/openapi.json", headers={"authorization": "Bearer long-enough"})).json()
    assert found["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    for path, item in found["paths"].items():
        for operation in item.values():
            assert operation["security"] == ([] if path == "/health" else [{"bearer": []}])
            assert ("401" in operation["responses"]) == (path != "/health")
