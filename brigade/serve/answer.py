"""Runs the generations of one request: start all or none, read them together, end them all when nobody wants them.

Life of a request's generations:
1. `start` submits every choice; if one is refused, the others are cancelled and the refusal is raised.
2. `deltas` yields from all of them as they come.
3. However that ends (finished, failed, client gone, server closing), `cancel` is called, and pages come back.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive

from brigade.engine.output import BadRequest, Delta, TokenLogprob, Unavailable
from brigade.serve.errors import ClientGone
from brigade.spec.sampling import SamplingParams

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet
    from brigade.engine.generation import Generation

T = TypeVar("T")


@dataclass(slots=True)
class Life:
    """Where the server is between its start and its end. The server writes it, routes read it."""

    draining: bool = False
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when running requests must end now."""


@dataclass(slots=True)
class Choice:
    """What one generation has given so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    n_tokens: int = 0
    offset: int = 0
    """Where the next token's text begins if all tokens' texts are joined: text may be held back, tokens are not."""
    n_cached: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Count a delta; the texts and log-probabilities are kept by `keep`."""
        self.n_tokens += len(delta.tokens)
        self.n_cached = max(self.n_cached, delta.n_cached)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def keep(self, delta: Delta) -> None:
        """Remember what a streamed answer need not remember."""
        self.text.append(delta.text)
        self.logprobs += delta.logprobs


class Answer:
    """The generations of one request: `n` for each prompt, in the order of the choices' indexes."""

    def __init__(self, generations: Sequence["Generation"], n_prompt_tokens: Sequence[int]) -> None:
        self._generations = generations
        self.n_prompt = sum(n_prompt_tokens)
        self._per_prompt = len(generations) // len(n_prompt_tokens)
        self.choices = [Choice() for _ in generations]

    @property
    def n_cached(self) -> int:
        """Cached prompt tokens. A prompt counts once, as in `n_prompt`, by its first choice: the others come after it
        and find its pages."""
        return sum(choice.n_cached for choice in self.choices[:: self._per_prompt])

    @property
    def n_tokens(self) -> int:
        """Tokens generated, all choices together."""
        return sum(choice.n_tokens for choice in self.choices)

    @classmethod
    async def start(
        cls,
        engine: "Fleet",
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        salt: str,
        priority: int = 0,
    ) -> "Answer":
        """Submit `params.choices()` for each prompt. Raises what Fleet.submit raises, leaving nothing running."""
        generations: list[Generation] = []
        n_choices, room = sum(p.n for p in params), engine.config.max_running + engine.config.max_waiting
        if n_choices > room:
            raise BadRequest(f"{n_choices} choices are more than this server runs at a time ({room})", param="n")
        try:
            for prompt, wanted in zip(prompts, params, strict=True):
                for each in wanted.choices():
                    generations.append(await engine.submit(prompt, each, salt, priority))
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return cls(generations, [len(prompt) for prompt in prompts])

    def cancel(self) -> None:
        """End every generation. Harmless when they have ended."""
        for generation in self._generations:
            generation.cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """Pairs of a choice's index and its next delta, as they come. Raises Unavailable if the worker dies.

        Close it (contextlib.aclosing) when leaving early, so that the generations end at once.
        """
        waiting = {asyncio.ensure_future(anext(g)): i for i, g in enumerate(self._generations)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):
                    i = waiting.pop(task)
                    delta = _result(task)
                    self.choices[i].add(delta)
                    if delta.finish_reason is None:
                        waiting[asyncio.ensure_future(anext(self._generations[i]))] = i
                    yield i, delta
        finally:
            for task in waiting:
                task.cancel()
            self.cancel()

    async def finish(self) -> None:
        """Wait for the end, keeping everything in `choices`. Raises Unavailable if the worker dies."""
        async with aclosing(self.deltas()) as deltas:
            async for i, delta in deltas:
                self.choices[i].keep(delta)


def _result(task: asyncio.Future[Delta]) -> Delta:
    try:
        return task.result()
    except StopAsyncIteration:
        raise Unavailable("the generation was ended before its answer was complete") from None


async def while_wanted(work: Coroutine[Any, Any, T], receive: Receive, life: Life) -> T:
    """The result of `work`, which is cancelled if the client leaves (ClientGone) or the server closes (Unavailable).

    `receive` must have given the whole request body, so that a disconnect is all it can report.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    closing = asyncio.ensure_future(life.closing.wait())
    try:
        await asyncio.wait((working, gone, closing), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        for task in (working, gone, closing):
            task.cancel()
        await asyncio.wait((working, gone, closing))
    if gone.done() and not gone.cancelled():
        raise ClientGone
    raise Unavailable("the server is shutting down")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
