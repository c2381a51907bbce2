"""Runs the generations of one request: start all or none, read them together, end them all when nobody wants them.

Life of a request's generations:
1. `start` submits every choice; if one is refused, the others are cancelled and the refusal is raised.
2. `deltas` yields from all of them as they come.
3. However that ends (finished, failed, client gone, server closing), `cancel` is called, and pages come back.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from brigade.engine.output import BadRequest, Delta, TokenLogprob, Unavailable
from brigade.spec.sampling import SamplingParams

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet
    from brigade.engine.generation import Generation

_CUT_SHORT = "the generation was ended before its answer was complete"


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

    @property
    def rids(self) -> list[int]:
        """What the engine calls the generations."""
        return [generation.rid for generation in self._generations]

    @property
    def complete(self) -> bool:
        """Whether every choice has given its last piece."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @classmethod
    async def start(
        cls,
        engine: "Fleet",
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        salt: str,
        priority: int = 0,
    ) -> "Answer":
        """Submit `params.choices()` for each prompt. Raises what Fleet.submit raises, leaving nothing running, and
        BadRequest for more choices than could ever run."""
        generations: list[Generation] = []
        n_choices, most = sum(p.n for p in params), engine.most
        if n_choices > most:
            raise BadRequest(f"{n_choices} choices are more than this server runs at a time ({most})", param="n")
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

    def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """Pairs of a choice's index and its next delta, as they come. Raises Unavailable if the worker dies.

        Close it (contextlib.aclosing) when leaving early, so that the generations end at once.
        """
        return self._one() if len(self._generations) == 1 else self._several()

    async def _one(self) -> AsyncGenerator[tuple[int, Delta]]:
        """Without the tasks that several need: this is what most requests are."""
        choice, generation = self.choices[0], self._generations[0]
        try:
            async for delta in generation:
                choice.add(delta)
                yield 0, delta
                if delta.finish_reason is not None:
                    return
            raise Unavailable(_CUT_SHORT)
        finally:
            self.cancel()

    async def _several(self) -> AsyncGenerator[tuple[int, Delta]]:
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
        raise Unavailable(_CUT_SHORT) from None
