"""What a hand-over adds between the first and the second token of a long prompt: the time from the last layer of the
prefill rank to the first decode step of the other one.

    python -m bench.handover CHECKPOINT [--tokens 4096] [--links shared,tcp] [--rounds 5]

A fleet of one prefill and one decode rank gets one prompt at a time, each with another beginning, so that no cache has
any of it. The first token is sampled by the prefill rank right after its last layer, the second by the decode rank.
What lies between them, less a decode step of that context, is what the hand-over adds: the rows that are still missing,
and the messages that carry the request from one rank to the other.
"""

import argparse
import asyncio
import random
import statistics
from pathlib import Path

from brigade.engine.config import EngineConfig
from brigade.engine.fleet import Fleet
from brigade.engine.fleet_config import FleetConfig, UnitConfig
from brigade.engine.output import Unobserved
from brigade.spec.sampling import SamplingParams

ANSWER = 12
"""Tokens of each answer."""


class Clock(Unobserved):
    """Seconds until the first token, and between two tokens."""

    def __init__(self) -> None:
        self.first, self.gaps = 0.0, list[float]()

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None:
        self.first, self.gaps = seconds, []

    def next_token(self, seconds: float) -> None:
        self.gaps.append(seconds)


async def measure(options: argparse.Namespace, link: str) -> None:
    base = EngineConfig(
        model=str(options.checkpoint), kv_bytes=options.kv_mib << 20, threads=options.threads, max_running=8
    )
    clock, rng = Clock(), random.Random(1)
    units = (
        UnitConfig(name="prefill", role="prefill", engine=base),
        UnitConfig(name="decode", role="decode", engine=base),
    )
    fleet = await Fleet.start(FleetConfig(units=units, link=link), observer=clock)  # type: ignore[arg-type]
    rows = list[tuple[float, float, float]]()
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    try:
        for _ in range(options.rounds):
            prompt = [rng.randrange(4, fleet.spec.vocab) for _ in range(options.tokens)]
            async for _ in await fleet.submit(prompt, params):
                pass
            rows.append((clock.first, clock.gaps[0], statistics.median(clock.gaps[1:])))
        how = ", ".join(f"{n} {what}" for what, n in fleet.transfers.items())
    finally:
        await fleet.close()
    first, second, step = (statistics.median(row[i] for row in rows) for i in range(3))
    adds = [row[1] - row[2] for row in rows]
    print(
        f"| {link} | {first:.2f} | {1e3 * second:.1f} | {1e3 * step:.1f} | {1e3 * statistics.median(adds):.1f} |"
        f" {1e3 * min(adds):.1f} to {1e3 * max(adds):.1f} | {how} |",
        flush=True,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--links", default="shared,tcp", help="which, in this order")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1, help="of each rank")
    p.add_argument("--kv-mib", type=int, default=256, help="memory of each rank's cache")
    options = p.parse_args()
    print(f"prompts of {options.tokens} tokens, {options.rounds} of them")
    print("| link | first token, s | first to second, ms | a step, ms | the hand-over adds, ms | of all | rows |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for link in options.links.split(","):
        asyncio.run(measure(options, link))


if __name__ == "__main__":
    main()
