"""What a good request gets: texts, counts, log-probabilities and events, against a story known in advance."""

import json
from typing import Any

import httpx
import pytest

from brigade.serve.config import ConfigError
from tests.serve.conftest import CHAT, COMPLETION, client_of
from tests.serve.fake_engine import END_OF_TEXT, STORY, TOKENIZER, FakeEngine

N_STORY = len(TOKENIZER.encode(STORY))


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream that ended well, without the final [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_a_chat_gets_the_whole_story(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = (await client.post("/v1/chat/completions", json=CHAT)).json()

    assert body["object"] == "chat.completion"
    assert body["model"] == "fox"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": STORY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = engine.last.prompt
    assert prompt == [END_OF_TEXT, *TOKENIZER.encode("Tell me a story")]
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": N_STORY,
        "total_tokens": len(prompt) + N_STORY,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_chat_without_max_tokens_may_fill_the_context(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/chat/completions", json=CHAT)
    assert engine.last.params.max_tokens == engine.ready.max_context - len(engine.last.prompt)


async def test_a_completion_without_max_tokens_gets_16_or_what_fits(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/v1/completions", json={"model": "fox", "prompt": [5] * 10})
    assert engine.last.params.max_tokens == 16
    await client.post("/v1/completions", json={"model": "fox", "prompt": [5] * 250})
    assert engine.last.params.max_tokens == 6


async def test_reaching_max_tokens_ends_with_length(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={**COMPLETION, "max_tokens": 2})).json()
    assert body["choices"][0]["text"] == "Once upon"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_every_parameter_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked = {
        "max_completion_tokens": 7,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.25,
        "seed": 9,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"12": -100, "7": 2.5},
        "logprobs": True,
        "top_logprobs": 3,
        "stop": ["END", "STOP"],
        "stop_token_ids": [4, 5],
        "ignore_eos": True,
        "cache_salt": "tenant",
        "priority": -7,
    }
    response = await client.post("/v1/chat/completions", json={**CHAT, **asked})

    assert response.status_code == 200, response.text
    params = engine.last.params
    assert params.max_tokens == 7
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (1, 0.5, 3, 0.25, 9)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 0.5, 1.5)
    assert params.logit_bias == ((12, -100), (7, 2.5))
    assert params.logprobs == 3
    assert params.stop == ("END", "STOP")
    assert params.stop_token_ids == (4, 5)
    assert params.ignore_eos
    assert engine.salts == ["tenant"]
    assert engine.priorities == [-7]


async def test_what_the_client_leaves_open_comes_from_the_checkpoint(engine: FakeEngine) -> None:
    engine.generation = {"temperature": 0.6, "top_p": 0.95, "top_k": None, "do_sample": True, "eos_token_id": 2}
    async with client_of(engine) as client:
        await client.post("/v1/completions", json={**COMPLETION, "top_p": 0.5})
    assert (engine.last.params.temperature, engine.last.params.top_p, engine.last.params.top_k) == (0.6, 0.5, 0)


async def test_a_checkpoint_that_does_not_sample_is_greedy_by_default(engine: FakeEngine) -> None:
    engine.generation = {"do_sample": False, "temperature": 0.6}
    async with client_of(engine) as client:
        await client.post("/v1/completions", json=COMPLETION)
    assert engine.last.params.temperature == 0


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": 1.5}, {"min_p": True}])
async def test_a_bad_generation_default_stops_the_start_and_names_the_file(
    engine: FakeEngine, bad: dict[str, Any]
) -> None:
    engine.generation = bad
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*" + next(iter(bad))):
        client_of(engine)


async def test_n_choices_count_the_prompt_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.n_cached = 4
    body = (await client.post("/v1/chat/completions", json={**CHAT, "n": 3, "max_tokens": 2, "seed": 5})).json()

    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [g.params.seed for g in engine.submitted] == [5, 6, 7]
    assert body["usage"]["prompt_tokens"] == len(engine.last.prompt)
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_a_stream_says_the_role_then_the_story_then_why_it_ended(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})

    assert response.headers["content-type"].startswith("text/event-stream")
    choices = [event["choices"][0] for event in events_of(response)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == STORY
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert len(choices) == N_STORY + 2


async def test_include_usage_adds_a_last_event_without_choices(client: httpx.AsyncClient) -> None:
    for path, asked in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        *others, last = events_of(await client.post(path, json=asked))
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == N_STORY
        assert all(event["usage"] is None for event in others)


async def test_streamed_choices_are_told_apart_by_index(client: httpx.AsyncClient) -> None:
    events = events_of(await client.post("/v1/completions", json={**COMPLETION, "n": 3, "stream": True}))
    for i in range(3):
        own = [c for event in events for c in event["choices"] if c["index"] == i]
        assert "".join(c["text"] for c in own) == STORY
        assert own[-1]["finish_reason"] == "stop"


async def test_several_prompts_get_n_choices_each(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked = {**COMPLETION, "prompt": ["One", "Another"], "n": 2, "echo": True, "max_tokens": 1}
    body = (await client.post("/v1/completions", json=asked)).json()
    assert [c["text"] for c in body["choices"]] == ["OneOnce", "OneOnce", "AnotherOnce", "AnotherOnce"]
    lengths = {len(TOKENIZER.encode("One")), len(TOKENIZER.encode("Another"))}
    assert {len(g.prompt) for g in engine.submitted} == lengths
    assert body["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(p)) for p in ("One", "Another"))


async def test_prompts_may_be_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for prompt in ([527, 501, 263], [[527, 501, 263]]):
        asked = {**COMPLETION, "prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
        events = events_of(await client.post("/v1/completions", json=asked))
        assert engine.last.prompt == [527, 501, 263]
        assert "".join(c["text"] for event in events for c in event["choices"]) == "Once upon aOnce"


async def test_chat_log_probabilities_have_openais_shape(client: httpx.AsyncClient) -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    entry = {"token": "Once", "logprob": -0.5, "bytes": [79, 110, 99, 101]}
    other = {"token": TOKENIZER.token_text(500), "logprob": -1.0, "bytes": TOKENIZER.token_bytes(500)}
    expected = {"content": [{**entry, "top_logprobs": [entry, other]}], "refusal": None}

    whole = (await client.post("/v1/chat/completions", json=asked)).json()
    assert whole["choices"][0]["logprobs"] == expected

    events = events_of(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
    assert events[1]["choices"][0]["logprobs"] == expected


async def test_completion_log_probabilities_say_where_each_token_stands(client: httpx.AsyncClient) -> None:
    asked = {**COMPLETION, "logprobs": 1, "max_tokens": 3}
    found = (await client.post("/v1/completions", json=asked)).json()["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["Once", " upon", " a"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"Once": -0.5}, {" upon": -0.5}, {" a": -0.5}],
        "text_offset": [0, 4, 9],
    }
    events = events_of(await client.post("/v1/completions", json={**asked, "stream": True}))
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert offsets == [[0], [4], [9]]


async def test_reasoning_is_given_apart_from_the_content(engine: FakeEngine, tmp_path: Any) -> None:
    template = "{{ messages[-1].content }}{# </think> #}<think>\n"
    (tmp_path / "chat_template.jinja").write_text(template)
    engine.config.model = str(tmp_path)
    engine.story = "Let me see.</think>\n\nIt is a fox."
    async with client_of(engine) as client:
        message = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It is a fox.")

        events = events_of(await client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "Let me see."
        assert "".join(d.get("content", "") for d in deltas) == "It is a fox."


async def test_an_answers_message_can_be_sent_back_as_it_came(client: httpx.AsyncClient) -> None:
    message = (await client.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]
    extra = {"tool_calls": None, "function_call": None, "audio": None, "annotations": [], "reasoning_content": "hm"}
    messages = [*CHAT["messages"], {**message, **extra}, {"role": "user", "content": "And then?"}]
    response = await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert response.status_code == 200, response.text


async def test_fields_without_effect_are_accepted(client: httpx.AsyncClient) -> None:
    both = {
        "user": "u1",
        "metadata": {"run": "7"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "stop": None,
        "seed": None,
        "logit_bias": None,
        "stream_options": None,
    }
    chat = {
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "reasoning_effort": None,
    }
    for path, asked in (
        ("/v1/chat/completions", {**CHAT, **both, **chat}),
        ("/v1/completions", {**COMPLETION, **both, "best_of": 2, "n": 2, "suffix": None}),
    ):
        response = await client.post(path, json=asked)
        assert response.status_code == 200, response.text


async def test_the_model_is_listed_and_described(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["fox"]
    assert (await client.get("/v1/models/fox")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == engine.ready.max_context


async def test_a_model_name_may_hold_slashes(engine: FakeEngine) -> None:
    async with client_of(engine, served_name="org/fox-1B") as client:
        assert (await client.get("/v1/models/org/fox-1B")).json()["id"] == "org/fox-1B"
