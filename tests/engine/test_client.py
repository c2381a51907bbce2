"""The engine with its real worker process and the demo model, in fair weather."""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.engine.output import BadRequest, EngineError, QueueFull, Unavailable
from brigade.spec.sampling import SamplingParams
from tests.engine.asking import GREEDY, LONG, ask, rest, start, until
from tests.engine.watched import serving

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPTS = [
    "Once upon a time",
    "Lily had a red ball",
    "The dog",
    "One day, a big bear went to the park with his mother and his father. They saw",
]


@pytest_asyncio.fixture(loop_scope="session")
async def untouched(engine: Engine) -> AsyncIterator[Engine]:
    """The shared engine, whose pages must all come back within a moment."""
    yield engine
    assert await engine.idle(10)
    assert await until(lambda: engine.stats().pages_used == 0 and not engine.stats().running, 3), engine.stats()


async def test_greedy_text_is_the_same_alone_and_among_others(untouched: Engine) -> None:
    alone = [await ask(untouched, p) for p in PROMPTS]
    assert all(alone)
    crowd = [ask(untouched, p) for p in PROMPTS * 4] + [
        ask(untouched, f"Tom {i}", temperature=1.0, seed=i) for i in range(4)
    ]
    assert (await asyncio.gather(*crowd))[:16] == alone * 4


async def test_a_seed_gives_the_same_text_alone_and_among_others(untouched: Engine) -> None:
    params = SamplingParams(seed=7, temperature=1.0, top_p=0.9, max_tokens=24, presence_penalty=0.5)
    alone = await ask(untouched, PROMPTS[0], params)
    crowd = await asyncio.gather(*(ask(untouched, PROMPTS[0], params, seed=7 + i // 4) for i in range(16)))
    assert crowd[:4] == [alone] * 4
    assert len(set(crowd)) == 4


async def test_without_a_seed_every_answer_is_another(untouched: Engine) -> None:
    answers = await asyncio.gather(*(ask(untouched, PROMPTS[0], temperature=1.5) for _ in range(4)))
    assert len(set(answers)) == 4


async def test_the_last_delta_alone_has_a_finish_reason(untouched: Engine) -> None:
    deltas = await rest(await untouched.submit(untouched.tokenizer.encode(PROMPTS[0]), GREEDY))
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert sum(len(d.tokens) for d in deltas) == 24


async def test_stop_strings_stop_tokens_and_log_probabilities_reach_the_worker(untouched: Engine) -> None:
    whole = await ask(untouched, PROMPTS[0])
    stop = whole[20:26]
    assert await ask(untouched, PROMPTS[0], stop=(stop,)) == whole[: whole.index(stop)]
    ids = untouched.tokenizer.encode(PROMPTS[0])
    deltas = await rest(await untouched.submit(ids, replace(GREEDY, logprobs=2, max_tokens=3)))
    scores = [p for d in deltas for p in d.logprobs]
    assert len(scores) == 3
    assert all(p.top[0] == (p.token, p.logprob) and len(p.top) == 2 and p.logprob <= 0 for p in scores)
    token = deltas[0].tokens[0]
    stopped = await rest(await untouched.submit(ids, replace(GREEDY, stop_token_ids=(token,))))
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason, len(stopped)) == ("stop", token, 1)


async def test_a_prompt_that_was_seen_is_found_in_the_cache_but_not_by_another_tenant(untouched: Engine) -> None:
    prompt = untouched.tokenizer.encode("A cat and a very small mouse lived in an old house near the sea. " * 4)
    n_full = (len(prompt) - 1) // untouched.ready.page * untouched.ready.page
    cached = []
    for salt in ("a", "a", "b"):
        deltas = await rest(await untouched.submit(prompt, GREEDY, salt))
        cached.append(deltas[-1].n_cached)
    assert cached == [0, n_full, 0]


async def test_cancelling_gives_the_pages_back(untouched: Engine) -> None:
    running = [await start(untouched, p) for p in PROMPTS]
    assert untouched.stats().pages_used > 0
    for generation in running:
        generation.cancel()
    assert await until(lambda: untouched.stats().pages_used == 0, 3)
    assert untouched.stats().running == 0
    late = [d for g in running for d in await rest(g)]
    assert all(d.finish_reason is None for d in late)


async def test_a_caller_that_is_cancelled_while_it_submits_leaves_nothing_behind(untouched: Engine) -> None:
    task = asyncio.ensure_future(untouched.submit([5, 6, 7], LONG))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():  # it was quick enough
        task.result().cancel()
    assert await untouched.idle(1)


async def test_more_requests_than_may_wait_are_refused_and_the_others_go_on(untouched: Engine) -> None:
    limit = untouched.config.max_running + untouched.config.max_waiting
    prompt = untouched.tokenizer.encode(PROMPTS[0])
    running = [await untouched.submit(prompt, replace(LONG, max_tokens=200)) for _ in range(limit)]
    with pytest.raises(QueueFull) as e:
        await untouched.submit(prompt, LONG)
    assert e.value.retry_after > 0
    assert await until(lambda: untouched.stats().waiting == untouched.config.max_waiting, 5)
    running[0].cancel()
    running.append(await untouched.submit(prompt, LONG))
    for generation in running:
        generation.cancel()


BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1 << 40),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("min_p", 2.0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("seed", 1 << 63),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logit_bias", ((4096, 1.0),)),
    ("logit_bias", ((1, 101.0),)),
    ("logit_bias", ((1, math.nan),)),
    ("logit_bias", ((1, 1.0),) * 1025),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (1,) * 129),
    ("stop", ("",)),
    ("stop", ("x" * 1025,)),
    ("stop", ("x",) * 17),
    ("n", 0),
    ("n", 129),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: str(v)[:20])
async def test_a_value_that_cannot_be_served_is_a_bad_request_that_names_its_field(
    untouched: Engine, field: str, value: Any
) -> None:
    with pytest.raises(BadRequest) as e:
        await untouched.submit([1, 2], replace(GREEDY, **{field: value}))
    assert e.value.param == field


WRONG_TYPE: list[tuple[str, Any]] = [
    ("stop", "END"),
    ("stop", ("\ud800",)),
    ("stop", (b"x",)),
    ("stop_token_ids", 5),
    ("stop_token_ids", (1.5,)),
    ("max_tokens", 5.5),
    ("max_tokens", True),
    ("max_tokens", "5"),
    ("temperature", "0"),
    ("temperature", None),
    ("top_k", 1.5),
    ("seed", 1.5),
    ("seed", "1"),
    ("logprobs", True),
    ("logit_bias", {5: 1.0}),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPE, ids=ascii)
async def test_a_value_of_the_wrong_type_is_a_bad_request_too_and_harms_nobody_else(
    untouched: Engine, field: str, value: Any
) -> None:
    """Without HTTP and its schema in front, the worker must still not die of a request."""
    other = await start(untouched)
    try:
        with pytest.raises(BadRequest) as e:
            await rest(await untouched.submit([1, 2], replace(GREEDY, **{field: value})))
        assert e.value.param == field
        assert (await anext(other)).text
    finally:
        other.cancel()
        for generation in list(untouched._generations.values()):  # keep the next test apart from this one
            generation.cancel()


@pytest.mark.parametrize("prompt", [[], [-1], [4096], [1 << 70], [1.0, 2.5], [True, "a"]], ids=str)
async def test_a_prompt_that_is_no_list_of_tokens_is_a_bad_request(untouched: Engine, prompt: list[Any]) -> None:
    with pytest.raises(BadRequest) as e:
        await rest(await untouched.submit(prompt, GREEDY))
    assert e.value.param == "prompt"


async def test_a_prompt_of_foreign_numbers_leaves_nothing_behind(untouched: Engine) -> None:
    """numpy's integers pass for integers almost everywhere; they cannot be sent."""
    np = pytest.importorskip("numpy")
    try:
        await rest(await untouched.submit([np.int64(5), np.int64(6)], GREEDY))
    except BadRequest:
        pass
    finally:
        left = list(untouched._generations.values())
        for generation in left:
            generation.cancel()
    assert left == []


async def test_context_overflow_is_named_with_its_code(untouched: Engine) -> None:
    room = untouched.ready.max_context
    for n_prompt, n_new, param in ((room, 1, "prompt"), (room + 5000, 1, "prompt"), (10, room - 9, "max_tokens")):
        with pytest.raises(BadRequest, match=str(room)) as e:
            await untouched.submit([5] * n_prompt, replace(GREEDY, max_tokens=n_new))
        assert (e.value.param, e.value.code) == (param, "context_length_exceeded")
    edge = await rest(await untouched.submit([5] * (room - 1), replace(GREEDY, max_tokens=1)))
    assert edge[-1].finish_reason is not None


async def test_it_is_healthy_while_it_works_and_while_it_is_idle(untouched: Engine) -> None:
    assert untouched.health().ready
    generation = await start(untouched)
    assert untouched.health().ready
    generation.cancel()
    await asyncio.sleep(0.7)
    assert untouched.health().ready


async def test_asking_whether_it_is_idle_needs_no_waiting(untouched: Engine) -> None:
    assert await untouched.idle(0)
    generation = await start(untouched)
    assert not await untouched.idle(0)
    generation.cancel()
    assert await untouched.idle(0)


async def test_draining_refuses_new_requests_and_lets_running_ones_end() -> None:
    engine = await Engine.start(EngineConfig())
    try:
        generation = await start(engine, params=replace(LONG, max_tokens=150))
        engine.drain()
        assert not engine.health().ready
        with pytest.raises(Unavailable, match="shutting down"):
            await engine.submit([1], GREEDY)
        assert not await engine.idle(0.01)
        assert (await rest(generation))[-1].finish_reason == "length"
        assert await engine.idle(1)
    finally:
        await engine.close()
    with pytest.raises(Unavailable):
        await engine.submit([1], GREEDY)


async def test_a_panic_in_one_requests_text_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As the tokenizer library's: not an Exception."""

    def panic(*_: object) -> str:
        raise Panic("called `Option::unwrap()` on a `None` value")

    async with serving() as served:
        broken = await served.engine.submit([5, 6], LONG)
        fine = await served.engine.submit([5, 7], GREEDY)
        monkeypatch.setattr(broken._text, "push", panic)
        with pytest.raises(EngineError, match="Panic"):
            async for _ in broken:
                pass
        assert [d async for d in fine]
        assert served.engine.health().ready
        assert await until(lambda: served.engine.stats().pages_used == 0, 3)
