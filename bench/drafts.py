"""Decode with drafts and without, in turn in one session: tokens/s, their ratio, and how many drafts were right.

    python -m bench.drafts                                     the demo model: real text
    python -m bench.drafts /tmp/mid-mtp --concurrency 1,8,32   random weights, no draft is right: what they cost

Prompts are pieces of bench/texts/story.txt, all different. Text is compared, too: it must be the same both ways.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from brigade import Brigade, SamplingParams
from brigade.engine.config import DEMO_MODEL

STORY = Path(__file__).parent / "texts" / "story.txt"
PROMPT = 32


class Round(NamedTuple):
    """One way at one concurrency."""

    rate: float
    """Tokens/s while all decode, from the last request's first token on."""
    texts: list[list[int]]
    n_drafted: int
    n_accepted: int


def main() -> int:
    """The command line. Returns the exit status: 1 if drafts changed the text."""
    parser = argparse.ArgumentParser(prog="bench.drafts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--dtype", default="auto", help="float32: on torch")
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    sizes = [int(n) for n in options.concurrency.split(",")]
    found: dict[tuple[int, int], list[Round]] = {}
    for _ in range(options.rounds):
        for drafts in (0, 1):
            for n, one in zip(sizes, measure(options, sizes, drafts), strict=True):
                found.setdefault((n, drafts), []).append(one)
    Console(width=100).print(table(sizes, found))
    if any(one.texts != found[n, 0][0].texts for (n, _), rounds in found.items() for one in rounds):
        print("drafts changed the text", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace, sizes: list[int], drafts: int) -> list[Round]:
    """The engine is started for this and ended after it, so no idle one takes memory or a core."""
    out = []
    settings = {"weights": options.weights, "dtype": options.dtype, "ranks": options.ranks, "drafts": drafts}
    with Brigade(str(options.checkpoint), **settings) as model:
        ids = model.engine.tokenizer.encode(STORY.read_text(encoding="utf-8"))
        params = SamplingParams(max_tokens=options.tokens, temperature=options.temperature, seed=1, ignore_eos=True)
        model.generate(ids[:PROMPT], SamplingParams(max_tokens=8, temperature=0))
        for n in sizes:
            step = max(1, (len(ids) - PROMPT) // n)
            prompts = [ids[i * step : i * step + PROMPT] for i in range(n)]
            before = model.engine.stats()
            begin = time.perf_counter()
            done = model.generate(prompts, params)
            seconds = time.perf_counter() - begin - max(c.timings.ttft for c in done)
            after = model.engine.stats()
            out.append(
                Round(
                    n * (options.tokens - 1) / seconds,
                    [c.token_ids for c in done],
                    after.n_drafted - before.n_drafted,
                    after.n_accepted - before.n_accepted,
                )
            )
    return out


def table(sizes: list[int], found: dict[tuple[int, int], list[Round]]) -> Table:
    out = Table(title="decode with drafts and without, rounds in turn")
    for name in ("at once", "tok/s without", "spread", "with drafts", "spread", "ratio", "accepted", "a step costs"):
        out.add_column(name, justify="right")
    for n in sizes:
        rates = [[one.rate for one in found[n, drafts]] for drafts in (0, 1)]
        without, with_drafts = map(statistics.median, rates)
        last = found[n, 1][-1]
        accepted = last.n_accepted / max(last.n_drafted, 1)
        out.add_row(
            str(n),
            f"{without:.0f}",
            f"{min(rates[0]):.0f}-{max(rates[0]):.0f}",
            f"{with_drafts:.0f}",
            f"{min(rates[1]):.0f}-{max(rates[1]):.0f}",
            f"{with_drafts / without:.2f}",
            f"{accepted:.1%}",
            f"{(1 + accepted) * without / with_drafts:.2f} x",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
