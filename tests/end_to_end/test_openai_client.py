"""The official client against a live server."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.end_to_end.running import Server, serving

MODEL = "brigade-demo"
STORY = [{"role": "user", "content": "Once upon a time there was a fox"}]


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=40, seed=1)
    assert len(answer.choices[0].message.content.split()) > 10
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_seed_repeats_and_another_seed_does_not(client: OpenAI) -> None:
    def text(seed: int) -> str:
        return (
            client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=30, seed=seed)
            .choices[0]
            .message.content
        )

    assert text(7) == text(7) != text(8)


def test_a_stream_says_what_one_answer_says(client: OpenAI) -> None:
    ask = {"model": MODEL, "messages": STORY, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    assert sum(len(c.choices) for c in chunks) > 5  # it did come in pieces; a slow reader finds several tokens in one


async def test_many_at_once_say_what_each_says_alone(server: Server) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def text(i: int) -> str:
            prompt = f"There were {i} little birds and "
            answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=10 + i, temperature=0)
            return answer.choices[0].text

        alone = [await text(i) for i in range(12)]
        assert list(await asyncio.gather(*(text(i) for i in range(12)))) == alone


def test_choices_logprobs_and_stop_strings(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=20, n=3, seed=3, logprobs=True, top_logprobs=2
    )
    assert len({c.message.content for c in answer.choices}) == 3
    first = answer.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 2
    assert first.logprob <= first.top_logprobs[0].logprob <= 0
    stopped = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=200, temperature=0, stop=["."])
    assert "." not in stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop"


def test_a_second_turn_finds_the_first_in_the_cache(client: OpenAI) -> None:
    prompt = "The king had a long road before him and " * 8
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    assert again.choices[0].text == first.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_errors_are_the_clients_own_types(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=STORY, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.chat.completions.create(model="gpt", messages=STORY)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=MODEL, prompt="word " * 2000, max_tokens=1)


def test_offsets_of_a_stream_are_those_of_the_whole(client: OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "Once", "max_tokens": 12, "temperature": 0, "logprobs": 1, "stop": [" time there"]}
    whole = client.completions.create(**ask).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in client.completions.create(**ask, stream=True) if c.choices]
    streamed = [(t, at) for p in pieces if p for t, at in zip(p.tokens, p.text_offset, strict=True)]
    assert streamed == list(zip(whole.tokens, whole.text_offset, strict=True))
    assert len(streamed) > 2


def test_more_choices_than_can_ever_run_are_refused_for_good() -> None:
    with serving("--max-running", "1", "--max-waiting", "0") as small:
        client = OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0, timeout=30)
        with pytest.raises(openai.BadRequestError, match="choices"):
            client.completions.create(model=MODEL, prompt="Once", n=2, max_tokens=2)
