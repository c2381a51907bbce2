"""One generation without a process: tokens in, deltas out."""

import asyncio
from typing import Any

import pytest

from brigade.engine.config import DEMO_MODEL
from brigade.engine.generation import Generation
from brigade.engine.messages import Logprob, Token
from brigade.engine.output import Delta, EngineError, Timings, TokenLogprob, Unavailable
from brigade.engine.tokenizer import Tokenizer
from brigade.spec.sampling import SamplingParams

TOKENIZER = Tokenizer(DEMO_MODEL)
EOS = TOKENIZER.control["<|end|>"]


class Ears:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None:
        self.heard.append(("first", (n_prompt, n_cached)))

    def next_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.heard.append(("next", None))

    def finished(self, timings: Timings, reason: str) -> None:
        self.heard.append(("finished", (timings.n_tokens, reason)))

    def restarted(self) -> None:
        raise AssertionError("not a generation's business")


class Case:
    """A generation with what it told its observer and its engine."""

    def __init__(self, **params: Any) -> None:
        self.ears = Ears()
        self.ended: list[bool] = []
        self.generation = Generation(
            1, 5, SamplingParams(**params), TOKENIZER, self.ears, lambda _, tell: self.ended.append(tell)
        )

    def say(self, text: str, finish: str = "", **token: Any) -> None:
        """Push a text's tokens, the last one with `finish`."""
        ids = TOKENIZER.encode(text)
        for i in ids[:-1]:
            self.generation.push(Token(1, i, **token))
        self.generation.push(Token(1, ids[-1], finish, **token))

    async def rest(self) -> list[Delta]:
        return [d async for d in self.generation]


def text(deltas: list[Delta]) -> str:
    return "".join(d.text for d in deltas)


async def test_deltas_that_pile_up_come_as_one() -> None:
    case = Case()
    case.say("Once upon a time", n_cached=16)
    delta = await anext(case.generation)
    assert (delta.text, delta.tokens) == ("Once upon a time", tuple(TOKENIZER.encode("Once upon a time")))
    assert (delta.finish_reason, delta.n_cached) == (None, 16)
    case.say(" there", "length")
    assert await case.rest() == [Delta(" there", tuple(TOKENIZER.encode(" there")), finish_reason="length")]
    with pytest.raises(StopAsyncIteration):
        await anext(case.generation)


async def test_a_caller_that_waits_gets_each_token_as_it_comes() -> None:
    case = Case()
    first = asyncio.ensure_future(anext(case.generation))
    await asyncio.sleep(0)
    case.say("Once")
    assert (await first).text == "Once"


async def test_end_of_sequence_has_no_text_and_no_stop_reason() -> None:
    case = Case()
    case.say("Once")
    case.generation.push(Token(1, EOS, "stop"))
    got = await case.rest()
    assert text(got) == "Once"
    assert (got[-1].finish_reason, got[-1].stop_reason, got[-1].tokens[-1]) == ("stop", None, EOS)
    assert case.ended == [False]


async def test_a_stop_token_that_was_asked_for_is_the_stop_reason_and_not_in_the_text() -> None:
    dot = TOKENIZER.encode(".")[0]
    case = Case(stop_token_ids=(dot,))
    case.say("Once.", "stop")
    got = await case.rest()
    assert (text(got), got[-1].finish_reason, got[-1].stop_reason) == ("Once", "stop", dot)


async def test_a_stop_string_across_tokens_ends_it_and_the_worker_is_told() -> None:
    case = Case(stop=(" time, there", "never"))
    case.say("Once upon a time, there was a girl")
    got = await case.rest()
    assert text(got) == "Once upon a"
    assert (got[-1].finish_reason, got[-1].stop_reason) == ("stop", " time, there")
    assert case.ended == [True]
    assert TOKENIZER.decode([t for d in got for t in d.tokens]) == "Once upon a time, there"


async def test_what_was_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    for finish in ("length", "stop"):
        case = Case(stop=("upon a time",))
        case.say("Once upon a")
        if finish == "stop":
            case.generation.push(Token(1, EOS, "stop"))
        else:
            case.say(" dog", "length")
        got = await case.rest()
        assert text(got) == ("Once upon a" if finish == "stop" else "Once upon a dog")
        assert got[-1].finish_reason == finish
        assert case.ended == [False]


async def test_a_stop_string_in_the_very_last_token_beats_the_length() -> None:
    case = Case(stop=(" time",))
    case.say("Once upon a time", "length")
    got = await case.rest()
    assert (text(got), got[-1].finish_reason, got[-1].stop_reason) == ("Once upon a", "stop", " time")
    assert case.ended == [False]  # the worker has finished it already


async def test_half_a_character_at_the_end_is_flushed() -> None:
    case = Case()
    case.generation.push(Token(1, TOKENIZER.encode("😀")[0]))
    case.generation.push(Token(1, EOS, "stop"))
    assert text(await case.rest()) == "�"


async def test_log_probabilities_go_with_their_tokens() -> None:
    case = Case(logprobs=1)
    case.generation.push(Token(1, 10, "", -0.25, [Logprob(10, -0.25)]))
    case.generation.push(Token(1, 11, "length", -0.5, [Logprob(9, -0.1)]))
    (delta,) = await case.rest()
    assert delta.logprobs == (TokenLogprob(10, -0.25, ((10, -0.25),)), TokenLogprob(11, -0.5, ((9, -0.1),)))


async def test_cancelling_ends_it_once_and_tells_the_worker() -> None:
    case = Case()
    waiting = asyncio.ensure_future(case.rest())
    await asyncio.sleep(0)
    case.generation.cancel()
    assert await asyncio.wait_for(waiting, 1) == []
    case.generation.cancel()
    case.say("late", "length")
    case.generation.fail(Unavailable("late"))
    assert await case.rest() == []
    assert case.ended == [True]
    assert case.ears.heard == [("finished", (0, "abort"))]


async def test_what_came_before_cancelling_can_still_be_read() -> None:
    case = Case()
    case.say("Once")
    case.generation.cancel()
    assert text(await case.rest()) == "Once"


async def test_cancelling_after_the_end_is_harmless() -> None:
    case = Case()
    case.say("Once", "length")
    case.generation.cancel()
    assert (await case.rest())[-1].finish_reason == "length"
    assert case.ended == [False]


async def test_a_failure_comes_after_the_deltas_before_it_and_every_time() -> None:
    case = Case()
    case.say("Once upon")
    case.generation.fail(Unavailable("gone"))
    case.generation.fail(Unavailable("gone again"))
    assert (await anext(case.generation)).text == "Once upon"
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^gone$"):
            await anext(case.generation)
    assert case.ended == [False]
    assert case.ears.heard[-1] == ("finished", (2, "error"))


async def test_a_failure_wakes_a_caller_that_waits() -> None:
    case = Case()
    waiting = asyncio.ensure_future(anext(case.generation))
    await asyncio.sleep(0)
    case.generation.fail(Unavailable("gone"))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(waiting, 1)


async def test_numbers_that_are_not_finite_end_it_with_an_error() -> None:
    case = Case()
    case.say("Once")
    case.generation.push(Token(1, 0, "error"))
    assert (await anext(case.generation)).text == "Once"
    with pytest.raises(EngineError, match="not finite"):
        await anext(case.generation)


async def test_the_observer_hears_first_next_and_end() -> None:
    case = Case()
    case.say("Once upon a", "length", n_cached=3)
    assert case.ears.heard == [("first", (5, 3)), ("next", None), ("next", None), ("finished", (3, "length"))]


async def test_timings_stand_still_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("brigade.engine.generation.time.monotonic", lambda: clock[0])
    case = Case()
    clock[0] = 102.0
    case.say("Once")
    clock[0] = 105.0
    case.say(" upon")
    clock[0] = 106.0
    case.say(" a", "length")
    clock[0] = 999.0
    assert case.generation.timings == Timings(ttft=2.0, total=6.0, n_tokens=3)
    assert case.generation.timings.tpot == 2.0


async def test_timings_before_the_first_token_count_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("brigade.engine.generation.time.monotonic", lambda: clock[0])
    case = Case()
    clock[0] = 103.0
    assert case.generation.timings == Timings(ttft=3.0, total=3.0, n_tokens=0)
    assert case.generation.timings.tpot == 0.0
