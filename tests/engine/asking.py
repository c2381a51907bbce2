"""Short ways to ask an engine, for tests."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from brigade.engine.client import Engine
from brigade.engine.generation import Generation
from brigade.engine.output import Delta
from brigade.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)


async def rest(generation: Generation) -> list[Delta]:
    return [d async for d in generation]


async def ask(engine: Engine, prompt: str, params: SamplingParams = GREEDY, **changes: Any) -> str:
    """The whole answer to one prompt."""
    generation = await engine.submit(engine.tokenizer.encode(prompt), replace(params, **changes))
    return "".join(d.text for d in await rest(generation))


async def start(engine: Engine, prompt: str = "Once upon a time", params: SamplingParams = LONG) -> Generation:
    """A generation whose first token is here."""
    generation = await engine.submit(engine.tokenizer.encode(prompt), params)
    await anext(generation)
    return generation


async def until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true within so many seconds."""
    for _ in range(int(seconds / 0.02) + 1):
        if true():
            return True
        await asyncio.sleep(0.02)
    return true()
