"""What a prompt on disk costs, beside computing it and finding it in memory; and what writing costs those who decode.

    python -m bench.kv_disk CHECKPOINT FOLDER [--prompt 4096] [--rounds 3] [--chats 8]

FOLDER is on the disk to be measured; what this writes there is removed again. Memory holds one prompt and a half, so
prompts that take turns are never in memory. `cold` tells the system to forget the files before each round, `warm`
leaves them in its cache. A plain read of the same files, one after the other into one buffer, is measured each time.

Memory is searched in pages of 16 tokens, the disk in steps of 64: with a prompt of one token more than a multiple of
64, both find the same.

The second table: time between two tokens of `--chats` streams in the half second after a long prompt got its first
token, which is when its rows are written, with and without the store, in turn.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from brigade.engine.client import Engine
from brigade.engine.config import EngineConfig
from brigade.spec.config import read_spec
from brigade.spec.memory import kv_bytes
from brigade.spec.sampling import SamplingParams

WRITING = 0.5
"""Seconds after a first token in which gaps of others are counted."""


def config(options: argparse.Namespace, folder: str, tokens: int) -> EngineConfig:
    return EngineConfig(
        model=options.checkpoint,
        kv_bytes=tokens // 16 * options.page_bytes,
        kv_disk=folder,
        kv_disk_bytes=64 << 30 if folder else 0,
    )


def prompt(seed: int, n: int, vocab: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, vocab) for _ in range(n)]


async def first(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were found."""
    generation = await engine.submit(tokens, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    deltas = [d async for d in generation]
    return generation.timings.ttft, deltas[-1].n_cached


async def written(engine: Engine) -> None:
    """Wait until nothing more is written."""
    before = -1
    while (now := engine.stats().store.written_bytes) != before:  # type: ignore[union-attr]
        before = now
        await asyncio.sleep(1.5)  # idle ranks tell every half second


def entries(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("brigade-kv/??/[0-9a-f]*"))


def forget(folder: str) -> None:
    """Have the system drop these files from its cache."""
    for path in entries(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain(folder: str, n: int) -> tuple[float, int]:
    """Seconds to read n entries one after the other, and their bytes."""
    paths = entries(folder)[:n]
    into = np.empty(max(p.stat().st_size for p in paths), np.uint8)
    began, total = time.perf_counter(), 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        total += os.readv(fd, [into])
        os.close(fd)
    return time.perf_counter() - began, total


async def times(options: argparse.Namespace, folder: str) -> None:
    found: dict[str, list[float]] = {"computed": [], "memory": [], "disk, warm": [], "disk, cold": []}
    cached: dict[str, int] = {}
    reads: dict[str, list[float]] = {"disk, warm": [], "disk, cold": []}
    n = options.prompt
    engine = await Engine.start(config(options, folder, n * 3 // 2))
    try:
        vocab, size = engine.spec.vocab, 0
        await first(engine, prompt(99, 64, vocab))
        prompts = [prompt(seed, n, vocab) for seed in range(options.rounds)]
        for tokens in prompts:
            for how in ("computed", "memory"):
                seconds, cached[how] = await first(engine, tokens)
                found[how].append(seconds)
            await written(engine)
        for how in reads:
            for tokens in prompts:
                if how == "disk, cold":
                    forget(folder)
                seconds, cached[how] = await first(engine, tokens)
                if cached[how] < n - 64:
                    raise SystemExit(f"only {cached[how]} of {n} tokens were found on disk")
                found[how].append(seconds)
                if how == "disk, cold":
                    forget(folder)
                seconds, size = plain(folder, n // 64)
                reads[how].append(seconds)
    finally:
        await engine.close()
    print(f"prompt of {n} tokens, {size / 1e6:.1f} MB on disk, {options.rounds} rounds, medians\n")
    print("| found | tokens | TTFT, ms | of computing | plain read, ms | GB/s |")
    print("|---|--:|--:|--:|--:|--:|")
    medians = {how: statistics.median(seconds) for how, seconds in found.items()}
    for how, seconds in medians.items():
        line = f"| {how} | {cached[how]} | {seconds * 1e3:.1f} | {seconds / medians['computed']:.3f} |"
        if how in reads:
            read = statistics.median(reads[how])
            line += f" {read * 1e3:.1f} | {size / read / 1e9:.2f} |"
        else:
            line += " | |"
        print(line, flush=True)


async def gaps(options: argparse.Namespace, engine: Engine, seed: int) -> list[float]:
    """Seconds between two tokens of chats, of those in the time after a long prompt's first token."""
    vocab, ends, marks, stop = engine.spec.vocab, list[float](), list[tuple[float, float]](), asyncio.Event()

    async def chat(number: int) -> None:
        most = min(4000, engine.ready.max_context - 32)
        params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=True)
        while not stop.is_set():
            last, generation = 0.0, await engine.submit(prompt(1000 + number, 32, vocab), params)
            async for _ in generation:
                now = time.perf_counter()
                if last:
                    marks.append((last, now))
                last = now
                if stop.is_set():
                    generation.cancel()
                    break

    chats = [asyncio.create_task(chat(i)) for i in range(options.chats)]
    for i in range(options.rounds):
        await asyncio.sleep(0.5)
        await first(engine, prompt(100 * seed + i, options.prompt // 2, vocab))
        ends.append(time.perf_counter())
        await asyncio.sleep(WRITING)
    stop.set()
    await asyncio.gather(*chats)
    return [b - a for a, b in marks if any(end <= a and b <= end + WRITING for end in ends)]


async def steadiness(options: argparse.Namespace, folder: str) -> None:
    ways: dict[str, list[float]] = {"without": [], "with": []}
    for seed in range(2):
        for way in ways:
            tokens = options.prompt * 2 + options.chats * 2048
            engine = await Engine.start(config(options, folder if way == "with" else "", tokens))
            try:
                ways[way] += await gaps(options, engine, 10 + seed)
            finally:
                await engine.close()
    print(f"\n{options.chats} chats, after a prompt of {options.prompt // 2} tokens, {2 * options.rounds} of them\n")
    print("| store | gaps | p50, ms | p90, ms | p99, ms | longest, ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for way, seconds in ways.items():
        p = statistics.quantiles(seconds, n=100)
        cells = " | ".join(f"{x * 1e3:.1f}" for x in (p[49], p[89], p[98], max(seconds)))
        print(f"| {way} | {len(seconds)} | {cells} |", flush=True)


async def main(options: argparse.Namespace) -> None:
    options.page_bytes = kv_bytes(read_spec(Path(options.checkpoint)), 16)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        await times(options, folder)
        if options.chats:
            await steadiness(options, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=8, help="0: leave the second table out")
    asyncio.run(main(parser.parse_args()))
