"""What long prompts cost those who are being answered: time between tokens of chats while long prompts arrive, on units
that do both and on a prefill and a decode unit, in turn, with the same arrivals.

    python -m bench.interference CHECKPOINT [--chats 8] [--pace 7] [--prompt 2048] [--every 3] [--seconds 45] \
        [--plot FILE]

Chats run in each of `--chats` streams, a new one every `--pace` seconds or one right after another, as fast as each
deployment can; a long prompt with an answer of one token comes every `--every` seconds. Only at a pace that both can
keep is the throughput the same. Both deployments get the same cores: `mixed` one unit of one rank with all threads,
`apart` a prefill and a decode unit that share them. Both must keep up with the long prompts, or the comparison is not
fair: the table shows how many were answered of those that came, and how many tokens of chats. The plot (SVG) has the
longest time between two tokens in each part of the first run of both.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from brigade.engine.config import EngineConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.plan.plots import COLOURS, Plot
from brigade.spec.sampling import SamplingParams

CHAT_PROMPT, CHAT_TOKENS = 32, 128
WINDOW = 0.25
"""Seconds of a run that are one point of the plot."""


class Heard:
    """What happened in one run."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        """Seconds between two tokens of a chat."""
        self.longest: dict[int, float] = {}
        """Part of the run, WINDOW seconds long -> the longest of those that ended in it."""
        self.n_tokens = self.n_long = self.n_answered = 0
        self.first: list[float] = []
        """Seconds until the first token of a long prompt."""

    def gap(self, at: float, seconds: float, n: int) -> None:
        """`n` tokens came together, `at` seconds after the beginning, so long after the one before."""
        each, part = seconds / n, int(at / WINDOW)
        self.gaps += [each] * n
        self.longest[part] = max(self.longest.get(part, 0.0), each)


async def run(engine: Fleet, options: argparse.Namespace) -> Heard:
    """Chats and long prompts for `--seconds`."""
    heard, rng, vocab = Heard(), random.Random(1), engine.spec.vocab
    began = time.perf_counter()
    until = began + options.seconds

    def prompt(n: int) -> list[int]:
        return [rng.randrange(4, vocab) for _ in range(n)]

    async def chat(number: int) -> None:
        params = SamplingParams(max_tokens=CHAT_TOKENS, temperature=0, ignore_eos=True)
        due = began + options.pace * number / options.chats
        while max(time.perf_counter(), due) < until:
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            due += options.pace
            last = 0.0
            async for delta in await engine.submit(prompt(CHAT_PROMPT), params):
                now = time.perf_counter()
                heard.n_tokens += len(delta.tokens)
                if last and delta.tokens:
                    heard.gap(now - began, now - last, len(delta.tokens))
                last = now

    async def one_long() -> None:
        heard.n_long += 1
        begin = time.perf_counter()
        async for _ in await engine.submit(prompt(options.prompt), SamplingParams(max_tokens=1, temperature=0)):
            heard.first.append(time.perf_counter() - begin)
            heard.n_answered += time.perf_counter() <= until + options.every

    async def arriving() -> None:
        tasks = []
        while time.perf_counter() < until:
            tasks.append(asyncio.create_task(one_long()))
            await asyncio.sleep(options.every)
        await asyncio.gather(*tasks)

    await asyncio.gather(arriving(), *(chat(i) for i in range(options.chats)))
    return heard


async def start(name: str, options: argparse.Namespace) -> Fleet:
    """`mixed` or `apart`, on all cores."""
    base = EngineConfig(model=str(options.checkpoint), max_step_tokens=options.chunk, max_running=options.chats + 8)
    if name == "mixed":
        return await Fleet.start(FleetConfig.alone(base))
    prefill = UnitConfig(name="prefill-0", role="prefill", engine=base)
    decode = UnitConfig(name="decode-0", role="decode", engine=base)
    return await Fleet.start(FleetConfig(units=(prefill, decode)))


async def measure(options: argparse.Namespace) -> int:
    runs: dict[str, list[Heard]] = {"mixed": [], "apart": []}
    for _ in range(options.rounds):
        for name, done in runs.items():
            engine = await start(name, options)
            try:
                done.append(await run(engine, options))
            finally:
                await engine.close()
    print(
        "| deployment | chat tokens/s | ms a token, p50 | p90 | p99 | largest | long prompts, answered | ttft p50, s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    p99 = {}
    for name, done in runs.items():
        gaps = sorted(g for heard in done for g in heard.gaps)
        first = [f for heard in done for f in heard.first]
        p99[name] = at(gaps, 0.99)
        rate = sum(h.n_tokens for h in done) / (options.seconds * len(done))
        answered = f"{sum(h.n_answered for h in done)} of {sum(h.n_long for h in done)}"
        times = " | ".join(f"{1e3 * x:.1f}" for x in (at(gaps, 0.5), at(gaps, 0.9), p99[name], gaps[-1]))
        print(f"| {name} | {rate:.0f} | {times} | {answered} | {statistics.median(first):.2f} |")
    print(f"p99 apart over mixed: {p99['apart'] / p99['mixed']:.2f} (aim: at most 0.33)")
    if options.plot:
        options.plot.write_text(plot({name: done[0].longest for name, done in runs.items()}, options.seconds))
    return 0


def plot(longest: Mapping[str, Mapping[int, float]], seconds: float) -> str:
    """An SVG: the longest time between two tokens over the time of a run, a line for each deployment."""
    most = 1e3 * max(gap for parts in longest.values() for gap in parts.values())
    axes = Plot(seconds, most, "seconds", "longest time between two tokens, ms")
    colours = list(zip(longest, COLOURS, strict=False))
    for name, colour in colours:
        axes.line([(WINDOW * part, 1e3 * gap) for part, gap in sorted(longest[name].items())], colour, dots=False)
    axes.legend(colours, 580)
    axes.out.insert(0, '<rect width="100%" height="100%" fill="white"/>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
    return axes.svg().replace("<svg ", head, 1) + "\n"


def at(values: Sequence[float], share: float) -> float:
    """The value below which this share of sorted values lies."""
    return values[min(int(share * len(values)), len(values) - 1)]


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.interference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two chats of a stream")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--every", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot here")
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
