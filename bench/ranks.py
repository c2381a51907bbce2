"""One model on one rank and on several, in turn in one session: decode tokens/s, and what share of the first it is;
then how long the smallest unit of several ranks takes to wake.

    python -m bench.ranks CHECKPOINT --layouts 1x2,2x1,4x1 --concurrency 32

A layout is ranks x threads of each; the first one is what the others are compared with. Text is compared, too: greedy
tokens must be the same in every layout.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from brigade import Brigade, SamplingParams
from brigade.spec.config import read_spec

PROMPT = 128


def main() -> int:
    """The command line. Returns the exit status: 1 if a layout changed the text."""
    parser = argparse.ArgumentParser(prog="bench.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layouts", default="1x2,2x1,4x1")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    layouts = [tuple(map(int, layout.split("x"))) for layout in options.layouts.split(",")]
    rng, vocab = random.Random(1), read_spec(options.checkpoint).vocab
    prompts = [[rng.randrange(4, vocab) for _ in range(PROMPT)] for _ in range(options.concurrency)]
    rates: list[list[float]] = [[] for _ in layouts]
    texts: list[list[list[int]]] = []
    for _ in range(options.rounds):
        for rate, (ranks, threads) in zip(rates, layouts, strict=True):
            tokens_per_s, text = measure(options.checkpoint, ranks, threads, prompts, options.tokens)
            rate.append(tokens_per_s)
            texts.append(text)
    Console(width=100).print(table(layouts, rates, options.concurrency))
    if several := [(ranks, threads) for ranks, threads in layouts if ranks > 1]:
        print(waking(options.checkpoint, *min(several), rounds=10 * options.rounds))
    if any(text != texts[0] for text in texts):
        print("the layouts do not say the same", file=sys.stderr)
        return 1
    return 0


def measure(
    checkpoint: Path, ranks: int, threads: int, prompts: list[list[int]], n: int
) -> tuple[float, list[list[int]]]:
    """Tokens/s while all prompts decode, from the last one's first token on; and the text.

    The engine is started for this and ended after it, so no idle one takes memory or a core.
    """
    params = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)
    many = {"max_running": len(prompts), "max_step_tokens": max(512, len(prompts))}
    with Brigade(str(checkpoint), ranks=ranks, threads=threads, **many) as model:
        model.generate(prompts[: ranks * 2], SamplingParams(max_tokens=2, temperature=0))
        begin = time.perf_counter()
        done = model.generate(prompts, params)
        total = time.perf_counter() - begin
    prefill = max(c.timings.ttft for c in done)
    return len(prompts) * (n - 1) / (total - prefill), [c.token_ids for c in done]


def waking(checkpoint: Path, ranks: int, threads: int, rounds: int) -> str:
    """How long an idle unit takes to wake: from a request of one token to its answer, less a decode step's time."""
    one, many = (SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 64))
    firsts, steps = [], []
    with Brigade(str(checkpoint), ranks=ranks, threads=threads) as model:
        model.generate([[5]], many)
        for _ in range(rounds):
            time.sleep(0.1)
            firsts.append(model.generate([[5]], one)[0].timings.ttft)
            steps.append(model.generate([[5]], many)[0].timings.tpot)
    first, step = statistics.median(firsts) * 1e3, statistics.median(steps) * 1e3
    return (
        f"waking {ranks} idle ranks: {first - step:.2f} ms of 5 allowed (first token after {first:.2f} ms, "
        f"worst {max(firsts) * 1e3:.2f}; a decode step takes {step:.2f})"
    )


def table(layouts: list[tuple[int, ...]], rates: list[list[float]], concurrency: int) -> Table:
    out = Table(title=f"decode, {concurrency} at once, rounds in turn")
    for name in ("ranks x threads", "tok/s", "spread", "of the first"):
        out.add_column(name, justify="right")
    first = statistics.median(rates[0])
    for (ranks, threads), rate in zip(layouts, rates, strict=True):
        middle = statistics.median(rate)
        out.add_row(
            f"{ranks} x {threads}", f"{middle:.0f}", f"{min(rate):.0f}-{max(rate):.0f}", f"{middle / first:.2f}"
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
