"""Experts that move while a unit serves: what a move does to the pauses between tokens, and what counting costs.

    python -m bench.rebalance CHECKPOINT --ranks 2 --redundant 8
    python -m bench.rebalance                                        # only what counting and the tables cost

The same prompts, whose beginnings are cached, are answered in turn without and with moves under way all the time, each
move to the placement for other random loads. Greedy tokens must be the same. A pause is the time between two tokens of
a request, as its caller sees it; that before the second token is left out, since other prompts may be computed then.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from brigade.core.moves import settle
from brigade.core.placement import Placement, place, replicas_for
from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.model.spread import WIDTH, Spread, Table
from brigade.spec.config import read_spec
from brigade.spec.model import ModelSpec
from brigade.spec.sampling import SamplingParams

PROMPT = 64


class Round:
    """What was seen while all prompts were answered once."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.n_slots = 0
        self.moves: list[float] = []
        """Seconds that each move took, from the decision until all ranks had made it."""
        self.seconds = 0.0
        self.text: list[list[int]] = []


async def measure(options: argparse.Namespace) -> int:
    spec = read_spec(options.checkpoint)
    config = EngineConfig(
        model=str(options.checkpoint),
        ranks=options.ranks,
        threads=options.threads,
        redundant_experts=options.redundant,
        weights=options.weights,
        depth=options.depth,
        rebalance=0,
    )
    rng = random.Random(1)
    prompts = [[rng.randrange(4, spec.vocab) for _ in range(PROMPT)] for _ in range(options.concurrency)]
    engine = await Engine.start(config)
    try:
        await answer(engine, prompts, 4)
        quiet, moving = [], []
        for _ in range(options.rounds):
            quiet.append(await answer(engine, prompts, options.tokens))
            moving.append(await answer(engine, prompts, options.tokens, rng))
    finally:
        await engine.close()
    print(f"{options.concurrency} requests x {options.tokens} tokens, {options.rounds} rounds in turn, {options}")
    print("| | tokens/s | pause p50, ms | p99 | p99.9 | longest |\n| --- |" + " --: |" * 5)
    for name, rounds in (("experts stay", quiet), ("experts move", moving)):
        print(f"| {name} | {line(rounds, options)} |")
    n, took = sum(r.n_slots for r in moving), [s for r in moving for s in r.moves]
    print(f"{n} slots changed hands in {len(took)} moves; a move took {statistics.median(took):.2f} s (median)")
    if any(r.text != quiet[0].text for r in [*quiet, *moving]):
        print("moves have changed the text", file=sys.stderr)
        return 1
    return 0


async def answer(engine: Engine, prompts: list[list[int]], n: int, rng: random.Random | None = None) -> Round:
    """All prompts at once; with `rng`, experts move until the last token."""
    seen = Round()
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)

    async def one(prompt: list[int]) -> list[int]:
        tokens, last = [], 0.0
        async for delta in await engine.submit(prompt, params):
            now = time.perf_counter()
            if len(tokens) > 1:
                seen.pauses.append(now - last)
            last = now
            tokens += delta.tokens
        return tokens

    begin = time.perf_counter()
    work = asyncio.gather(*map(one, prompts))
    while rng is not None and not work.done():
        start = time.perf_counter()
        assert engine.experts.placement is not None
        seen.n_slots += await engine.experts.move_to(elsewhere(rng, engine.experts.placement))
        seen.moves.append(time.perf_counter() - start)
        await asyncio.sleep(0.05)
    seen.text = await work
    seen.seconds = time.perf_counter() - begin
    return seen


def elsewhere(rng: random.Random, now: Placement) -> Placement:
    load = [[rng.paretovariate(1.2) for _ in range(now.n_experts)] for _ in range(now.n_layers)]
    there = place(load, n_slots=now.n_slots, n_groups=1, n_nodes=1, n_ranks=now.n_ranks)
    return settle(now, Placement(now.n_experts, now.n_ranks, now.n_nodes, there.phy2log, now.by_node))


def line(rounds: list[Round], options: argparse.Namespace) -> str:
    pauses = np.concatenate([r.pauses for r in rounds]) * 1e3
    rate = statistics.median(options.concurrency * options.tokens / r.seconds for r in rounds)
    parts = (np.percentile(pauses, q) for q in (50, 99, 99.9, 100))
    return f"{rate:.0f} | " + " | ".join(f"{p:.1f}" for p in parts)


def cost(spec: ModelSpec, redundant: int, n_ranks: int) -> None:
    """Microseconds a layer for counting and for the way from experts to slots."""
    assert spec.moe is not None
    rng, generator = random.Random(1), np.random.default_rng(1)
    e, k = spec.moe.n_experts, spec.moe.top_k
    load = [[rng.paretovariate(1.2) for _ in range(e)]] * (spec.n_layers - spec.n_dense)
    placement = place(load, n_slots=e + redundant, n_groups=1, n_nodes=1, n_ranks=n_ranks)
    spread = Spread(spec, 0, placement)
    table = Table([*replicas_for(placement, 0, 0)[:-1], tuple(range(WIDTH))])  # some choose among replicas
    print(f"{e} experts + {redundant} redundant, {k} of them a token; us a layer, median:")
    for n in (1, 32, 256):
        ids = torch.from_numpy(generator.random((n, e)).argsort(1)[:, :k].astype(np.int32))
        counting, slots = timed(partial(spread.count, spec.n_dense, ids)), timed(partial(table.slots, ids.numpy()))
        print(f"{n:>4} tokens: counting {counting:.1f}, slots {slots:.1f}")


def timed(work: Callable[[], object], n: int = 2000) -> float:
    took = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took) * 1e6


def main() -> int:
    """The command line. Returns the exit status: 1 if a move changed the text."""
    parser = argparse.ArgumentParser(prog="bench.rebalance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--redundant", type=int, default=8)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    spec = read_spec(options.checkpoint or Path(EngineConfig().model))
    cost(spec, options.redundant, options.ranks)
    return asyncio.run(measure(options)) if options.checkpoint else 0


if __name__ == "__main__":
    sys.exit(main())
