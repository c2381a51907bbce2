"""The official OpenAI client, sync, async and streaming, against a live server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from brigade.engine.output import QueueFull, Unavailable
from tests.serve.conftest import Live
from tests.serve.fake_engine import STORY, FakeEngine

KEY = "sk-brigade-test"
MESSAGES: Any = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Go"}]},
]


@pytest.fixture
async def live(serving: Callable[..., Any]) -> Live:
    found: Live = await serving(api_key=KEY)
    return found


@pytest.fixture
async def client(live: Live) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_the_sync_client_chats_streams_and_completes(live: Live) -> None:
    def talk() -> None:
        with OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
            assert [m.id for m in client.models.list()] == ["fox"]
            chat = client.chat.completions.create(model="fox", messages=MESSAGES)
            assert chat.choices[0].message.content == STORY
            chunks = list(client.chat.completions.create(model="fox", messages=MESSAGES, stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == STORY
            text = client.completions.create(model="fox", prompt="Go", max_tokens=2)
            assert text.choices[0].text == "Once upon"

    await asyncio.to_thread(talk)


async def test_the_async_client_chats(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="fox", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=3, seed=1
    )
    assert [c.message.content for c in chat.choices] == ["Once upon a"] * 2
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [entry.token for entry in chat.choices[0].logprobs.content] == ["Once", " upon", " a"]
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 6
    assert chat.usage.prompt_tokens_details is not None


async def test_the_async_client_streams_with_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fox", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == STORY
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


async def test_the_clients_stream_helper_puts_the_answer_together(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="fox", messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == STORY


async def test_the_async_client_streams_completions(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(model="fox", prompt=["Go", "On"], max_tokens=50, stream=True)
    said = ["", ""]
    async for chunk in stream:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == [STORY, STORY]


async def test_leaving_a_stream_early_ends_the_generation(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.stalls_after = 5
    stream = await client.chat.completions.create(model="fox", messages=MESSAGES, stream=True)
    await anext(stream)
    await stream.close()
    await engine.until_idle()
    assert engine.last.cancelled


async def test_errors_become_the_clients_exceptions(client: AsyncOpenAI, live: Live, engine: FakeEngine) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(model="fox", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        await ask(model="fox", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError) as missing:
        await ask(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong-key").models.list()
    engine.refusals = [QueueFull("full", 3), Unavailable("restarting")]
    with pytest.raises(openai.RateLimitError) as full:
        await ask(model="fox", messages=MESSAGES)
    assert full.value.response.headers["retry-after"] == "3"
    with pytest.raises(openai.InternalServerError):
        await ask(model="fox", messages=MESSAGES)


async def test_a_worker_lost_during_a_stream_is_an_exception(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.fails_after = 2
    stream = await client.chat.completions.create(model="fox", messages=MESSAGES, stream=True)
    said: list[str] = []

    async def read_all() -> None:
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="the worker process was lost"):
        await read_all()
    assert "".join(said) == "Once upon"
