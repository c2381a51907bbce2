"""Brigade as an engine to measure: its own client, as the offline API uses it, with every token timed."""

import asyncio
import dataclasses
import sys
import time
from importlib import metadata
from typing import Any

from bench.engines.wire import WARM_TOKENS, Decoded, Options, Prompts, answer, decoded
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.spec.sampling import SamplingParams

PRECISIONS = ("bf16", "int8", "int4")
STEP_TOKENS = 2048
"""Prefill chunk when nobody waits for a steady stream: larger ones make more of the weights that a step reads."""


class LoadedBrigade:
    """The engine and the event loop it lives in."""

    def __init__(self, options: Options) -> None:
        self._runner = asyncio.Runner()
        self._engine = self._runner.run(Engine.start(config(options)))

    def facts(self) -> dict[str, Any]:
        return {"version": metadata.version("brigade"), "notes": list(self._engine.ready.notes)}

    def warm(self, prompts: Prompts) -> None:
        self._runner.run(self._all(prompts, WARM_TOKENS))

    def decode(self, prompts: Prompts, n_out: int) -> Decoded:
        start = time.monotonic()
        return decoded(start, self._runner.run(self._all(prompts, n_out)))

    def prefill(self, prompts: Prompts) -> list[float]:
        return [self._first(p) for p in prompts]

    def _first(self, prompt: Any) -> float:
        start = time.monotonic()
        return self._runner.run(self._all([prompt], 1))[0][0] - start

    async def _all(self, prompts: Prompts, n_out: int) -> list[list[float]]:
        params = SamplingParams(max_tokens=n_out, temperature=0.0, ignore_eos=True)
        return list(await asyncio.gather(*(self._one(list(p), params) for p in prompts)))

    async def _one(self, prompt: list[int], params: SamplingParams) -> list[float]:
        times: list[float] = []
        async for delta in await self._engine.submit(prompt, params):
            times += [time.monotonic()] * len(delta.tokens)
        return times


def config(options: Options) -> EngineConfig:
    """The settings measured offline. Raises ValueError for a precision that this version does not have."""
    known = {f.name for f in dataclasses.fields(EngineConfig)}
    settings: dict[str, Any] = {
        "model": options.checkpoint,
        "dtype": "bfloat16",
        "threads": options.threads,
        "max_running": options.max_concurrency,
        "max_step_tokens": max(STEP_TOKENS, options.max_concurrency),
        "max_context": options.max_context,
    }
    if options.precision != "bf16":
        if "weights" not in known:
            raise ValueError(f"this version of Brigade has no {options.precision} weights")
        settings["weights"] = options.precision
    return EngineConfig(**(settings | options.settings))


def environment(options: Options) -> dict[str, str]:
    return {}


def python(options: Options) -> str:
    return sys.executable


def server(options: Options, port: int) -> list[str]:
    """The command that serves this over HTTP."""
    c = config(options)
    command = [sys.executable, "-m", "brigade", "serve", options.checkpoint, "--port", str(port), "--dtype", c.dtype]
    command += ["--threads", str(c.threads), "--max-running", str(c.max_running), "--max-context", str(c.max_context)]
    command += ["--weights", options.precision] if options.precision != "bf16" else []
    return command + [str(w) for name, v in options.settings.items() for w in (f"--{name.replace('_', '-')}", v)]


if __name__ == "__main__":
    answer(LoadedBrigade)
