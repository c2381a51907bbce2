"""The offline API: `Brigade(model).generate(prompts, params)`. The same engine as the server's, without HTTP."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.generation import Generation
from brigade.engine.output import BadRequest, Completion, TokenLogprob
from brigade.spec.sampling import SamplingParams

T = TypeVar("T")
Prompt = str | Sequence[int]


class Brigade:
    """A loaded model. Use it as a context manager, or call close(); settings are those of EngineConfig.

    Raises LoadError if the model cannot be loaded and ValueError for a setting that cannot work.
    """

    def __init__(self, model: str = str(DEMO_MODEL), **settings: Any) -> None:
        config = EngineConfig(model=str(model), **settings)
        self._room = asyncio.Semaphore(config.max_running + config.max_waiting)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="brigade", daemon=True)
        self._thread.start()
        try:
            self.engine = self._run(Engine.start(config))
        except BaseException:
            self._stop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
    ) -> list[Completion]:
        """Complete prompts (texts or token lists), all of them batched together.

        Returns `params.n` completions for each prompt, in order. `params` may be one set for all or one for each.
        Raises BadRequest for a prompt or a value that cannot be served, Unavailable if the worker dies.
        """
        many = _as_list(prompts)
        sets = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(sets) != len(many):
            raise ValueError(f"{len(many)} prompts but {len(sets)} sets of parameters")
        return self._run(self._generate(list(zip(many, sets, strict=True))))

    def close(self) -> None:
        """End the worker process. Harmless when called twice."""
        if self._thread.is_alive():
            self._run(self.engine.close())
            self._stop()

    def __enter__(self) -> "Brigade":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def _generate(self, requests: list[tuple[Prompt, SamplingParams]]) -> list[Completion]:
        tasks = []
        async with asyncio.TaskGroup() as group:
            for prompt, params in requests:
                self.engine.check(params)
                ids = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                tasks += [group.create_task(self._one(ids, choice)) for choice in params.choices()]
        return [t.result() for t in tasks]

    async def _one(self, ids: list[int], params: SamplingParams) -> Completion:
        async with self._room:  # offline there is no client to turn away: wait for a place in the queue
            return await self._finished(await self.engine.submit(ids, params))

    async def _finished(self, generation: Generation) -> Completion:
        text, tokens, reason, n_cached = "", list[int](), "", 0
        logprobs: list[TokenLogprob] = []
        try:
            async for delta in generation:
                text += delta.text
                tokens += delta.tokens
                logprobs += delta.logprobs
                reason, n_cached = delta.finish_reason or "", delta.n_cached
        finally:
            generation.cancel()
        return Completion(text, tokens, reason, generation.timings, generation.n_prompt, n_cached, logprobs)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this Brigade was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        """End the loop's thread; what still runs there (a start that was interrupted) is cancelled and waited for."""

        async def cancel_all() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.wait(rest, timeout=15) if rest else None

        asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    tokens = [p for p in prompts if isinstance(p, int)]
    many = [p for p in prompts if not isinstance(p, int)]
    if tokens and many:
        raise BadRequest("prompts mixes texts or token lists with single tokens", param="prompt")
    return [tokens] if tokens else many
