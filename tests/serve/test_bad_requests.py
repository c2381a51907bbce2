"""What a bad request gets: a 4xx in OpenAI's error shape that names the field, soon."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from brigade.engine.output import EngineError, QueueFull, Unavailable
from tests.serve.conftest import CHAT, COMPLETION, client_of
from tests.serve.fake_engine import FakeEngine

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
GOOD = {"chat": CHAT, "completion": COMPLETION}
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


async def post_raw(client: httpx.AsyncClient, body: bytes, kind: str = "chat") -> httpx.Response:
    return await client.post(PATHS[kind], content=body, headers=JSON)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {}),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "flex"),
        ("guided_json", {}),
        ("max_token", 3),
    ],
)
async def test_an_unsupported_field_is_named(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, value: object
) -> None:
    error = error_of(await client.post(PATHS["chat"], json={**CHAT, field: value}), 400)
    assert field in error["message"]
    assert error["param"].startswith(field)
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize(("field", "value"), [("best_of", 3), ("suffix", "end"), ("messages", [])])
async def test_an_unsupported_field_of_a_completion_is_named(
    client: httpx.AsyncClient, field: str, value: object
) -> None:
    error = error_of(await client.post(PATHS["completion"], json={**COMPLETION, field: value}), 400)
    assert error["param"] == field


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("model", None),
        ("max_tokens", "5"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**12),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", 2**64),
        ("seed", 0.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", -1),
        ("n", 129),
        ("n", 10**100),
        ("stop", [1]),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1025),
        ("stop", {}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [4096]),
        ("stop_token_ids", "4"),
        ("logit_bias", {"fox": 1}),
        ("logit_bias", {"4096": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1_0": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": None}),
        ("logit_bias", [1]),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("logprobs", -1),
        ("logprobs", 10**20),
        ("stream", "yes"),
        ("stream", 1),
        ("stream_options", {"include_usage": True}),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("priority", 1.5),
        ("priority", "high"),
        ("priority", True),
        ("priority", 1 << 31),
        ("user", 5),
        ("metadata", "x"),
        ("metadata", {str(i): 0 for i in range(1025)}),
    ],
)
async def test_a_wrong_value_is_refused_and_its_field_named(
    client: httpx.AsyncClient, engine: FakeEngine, kind: str, field: str, value: object
) -> None:
    error = error_of(await client.post(PATHS[kind], json={**GOOD[kind], field: value}), 400)
    assert error["param"].startswith(field)
    assert field in error["message"] or field == "stop"
    assert engine.submitted == []


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        {},
        [{}],
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "extra": 1}]}],
        [{"role": "user", "content": "x", "name": "me"}],
        [{"role": "user", "content": "x", "reasoning_content": "y"}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "function", "content": "x"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        [{"role": "user", "content": "x"}] * 2049,
    ],
)
async def test_messages_must_be_a_list_of_text_messages(
    client: httpx.AsyncClient, engine: FakeEngine, messages: object
) -> None:
    error = error_of(await client.post(PATHS["chat"], json={"model": "fox", "messages": messages}), 400)
    assert "messages" in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], 5, {}, [1, "a"], ["a", 1], [True], [-1], [4096], [1.0], [[1], [-1]], ["x"] * 129]
)
async def test_a_prompt_must_be_text_or_tokens(client: httpx.AsyncClient, engine: FakeEngine, prompt: object) -> None:
    error = error_of(await client.post(PATHS["completion"], json={**COMPLETION, "prompt": prompt}), 400)
    assert error["param"] == "prompt"
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_completion_fields_must_go_together(client: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(PATHS["completion"], json={**COMPLETION, **extra}), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {}}}, "chat_template_kwargs"),
    ],
)
async def test_chat_fields_must_go_together(client: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(PATHS["chat"], json={**CHAT, **extra}), 400)
    assert error["param"].startswith(param)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"{} {}",
        b"\xff",
        b"[" * 100_000,
        b'{"metadata":' + b'{"a":' * 100_000,
        b'{"model":"fox","metadata":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"seed":' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: body[:12].decode(errors="replace"),
)
async def test_a_body_that_is_not_a_json_object_is_refused(client: httpx.AsyncClient, kind: str, body: bytes) -> None:
    error_of(await post_raw(client, body, kind), 400)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "logit_bias"])
async def test_numbers_must_be_finite(client: httpx.AsyncClient, engine: FakeEngine, field: str, literal: str) -> None:
    value = literal if field != "logit_bias" else f'{{"5": {literal}}}'
    body = json.dumps(CHAT)[:-1] + f', "{field}": {value}}}'
    error = error_of(await post_raw(client, body.encode()), 400)
    assert error["param"].startswith(field)
    assert engine.submitted == []


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_a_lone_surrogate_is_refused(client: httpx.AsyncClient, engine: FakeEngine, kind: str) -> None:
    for escape in (rb"\ud800", rb"\udfff", rb"x\ud83d y", rb"\udc00\ud800"):
        body = json.dumps(GOOD[kind]).encode().replace(b"Tell", escape)
        error_of(await post_raw(client, body, kind), 400)
    assert engine.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        {**CHAT, **{f"field{i}": 1 for i in range(200_000)}},
        {**CHAT, "logit_bias": {str(i): "x" for i in range(200_000)}},
        {**CHAT, "metadata": {str(i): i for i in range(200_000)}},
        {**CHAT, "stop": [1] * 1_000_000},
        {**CHAT, "stop_token_ids": [-1] * 1_000_000},
        {**CHAT, "messages": [{"role": "user", "content": 1}] * 100_000},
        {**CHAT, "messages": [{"role": "user", "content": [{"type": 1}] * 200_000}]},
        {**CHAT, "messages": [{"role": "user", "content": "<|end|>" * 500_000}]},
        {**CHAT, "messages": [{"role": "user", "content": "x" * 4_000_000}]},
    ],
    ids=lambda body: next(reversed(body)),
)
async def test_megabytes_of_wrong_values_are_refused_quickly(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    began = time.monotonic()
    error_of(await client.post(PATHS["chat"], json=body), 400)
    assert time.monotonic() - began < 5


async def test_a_million_wrong_prompts_are_refused_quickly(client: httpx.AsyncClient) -> None:
    for prompt in ([[]] * 1_000_000, [1] * 1_000_000 + ["x"], ["x"] * 500_000, "x " * 2_000_000):
        error_of(await client.post(PATHS["completion"], json={**COMPLETION, "prompt": prompt}), 400)


async def test_a_body_over_4_mib_is_413(client: httpx.AsyncClient) -> None:
    error_of(await post_raw(client, b" " * (4 << 20) + b"x"), 413)

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * (1 << 20)

    error_of(await client.post(PATHS["chat"], content=in_pieces(), headers=JSON), 413)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
async def test_a_body_must_say_that_it_is_json(client: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await client.post(PATHS["chat"], content=json.dumps(CHAT).encode(), headers=headers)
    assert "application/json" in error_of(response, 415)["message"]


async def test_json_may_name_its_charset(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = await client.post(PATHS["chat"], content=json.dumps(CHAT).encode(), headers=headers)
    assert response.status_code == 200


async def test_another_model_is_not_found(client: httpx.AsyncClient) -> None:
    for path, body in ((PATHS["chat"], CHAT), (PATHS["completion"], COMPLETION)):
        error = error_of(await client.post(path, json={**body, "model": "gpt-4"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'fox'" in error["message"]
    assert error_of(await client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


async def test_a_request_without_a_model_is_refused(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(PATHS["chat"], json={"messages": CHAT["messages"]}), 400)
    assert (error["param"], error["code"]) == ("model", "missing_required_parameter")


async def test_unknown_paths_and_methods_have_the_same_error_shape(client: httpx.AsyncClient) -> None:
    error_of(await client.get("/v1/embeddings"), 404)
    error_of(await client.get("/docs"), 404)
    response = await client.get("/v1/chat/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_a_prompt_longer_than_the_context_says_so(client: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "story " * 300}]
    for path, body in (
        (PATHS["chat"], {**CHAT, "messages": long}),
        (PATHS["chat"], {**CHAT, "messages": [{"role": "user", "content": "story " * 100_000}]}),
        (PATHS["completion"], {**COMPLETION, "prompt": [5] * 256}),
        (PATHS["completion"], {**COMPLETION, "prompt": "story " * 100_000}),
        (PATHS["completion"], {**COMPLETION, "max_tokens": 256}),
    ):
        assert error_of(await client.post(path, json=body), 400)["code"] == "context_length_exceeded"


async def test_what_the_template_refuses_is_a_400_with_its_words(client: httpx.AsyncClient) -> None:
    messages = [{"role": "system", "content": "Be brief"}]
    error = error_of(await client.post(PATHS["chat"], json={**CHAT, "messages": messages}), 400)
    assert "the last user message" in error["message"]


async def test_a_model_without_a_template_points_to_completions(engine: FakeEngine, tmp_path: Any) -> None:
    engine.config.model = str(tmp_path)
    async with client_of(engine) as client:
        assert "/v1/completions" in error_of(await client.post(PATHS["chat"], json=CHAT), 400)["message"]
        assert (await client.post(PATHS["completion"], json=COMPLETION)).status_code == 200


async def test_a_full_queue_is_429_with_whole_seconds_to_wait(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for seconds, said in ((0.01, "1"), (1.2, "2"), (30.0, "30")):
        engine.refusals = [QueueFull("256 requests wait", seconds)]
        response = await client.post(PATHS["chat"], json=CHAT)
        error_of(response, 429)
        assert response.headers["retry-after"] == said


async def test_an_absent_worker_is_503_with_a_time_to_come_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for stream in (False, True):
        engine.refusals = [Unavailable("the worker is starting")]
        response = await client.post(PATHS["chat"], json={**CHAT, "stream": stream})
        error_of(response, 503)
        assert int(response.headers["retry-after"]) >= 1


async def test_one_refused_choice_cancels_the_ones_before_it(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusals = [None, None, QueueFull("full", 1.0)]
    error_of(await client.post(PATHS["chat"], json={**CHAT, "n": 4}), 429)
    assert [g.cancelled for g in engine.submitted] == [True, True]


async def test_a_worker_that_dies_on_the_way_is_503(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fails_after = 3
    error = error_of(await client.post(PATHS["chat"], json={**CHAT, "n": 2}), 503)
    assert error["message"] == "the worker process was lost"
    assert not engine.running


async def test_a_failure_of_the_model_is_500(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fails_after, engine.failure = 1, EngineError("the logits are not finite")
    assert error_of(await client.post(PATHS["chat"], json=CHAT), 500)["type"] == "server_error"


async def test_a_stream_whose_worker_dies_ends_with_an_error_event(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.fails_after = 3
    for kind in ("chat", "completion"):
        response = await client.post(PATHS[kind], json={**GOOD[kind], "stream": True, "n": 2})
        assert response.status_code == 200
        last = json.loads(response.text.strip().rpartition("\n\n")[2].removeprefix("data: "))
        assert last["error"]["message"] == "the worker process was lost"
        assert "[DONE]" not in response.text
        assert not engine.running


async def test_a_fault_of_our_own_is_500_and_tells_nothing_of_the_inside(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.refusals = [RuntimeError("secret path")]  # type: ignore[list-item]
    error = error_of(await client.post(PATHS["chat"], json=CHAT), 500)
    assert "secret" not in error["message"]
