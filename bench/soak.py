"""A fleet under random load and random faults for minutes: every answer is that of one rank, nothing is left behind.

    python -m bench.soak [--minutes 10] [--seed 1] [--markdown FILE]

1. load: clients ask for completions of prompts of very different lengths, one after another, and compare every answer
   with what one rank said before; some leave in the middle, some send nonsense.
2. fault: ranks and the gateway are killed and stand still, units are started again and change roles, at random moments.
3. recover: a probe asks until it has an answer: the time that users notice.
4. check: about once a minute the load pauses, and nobody may hold a page or a request any more.

Ends with 1 if an answer was wrong, late or missing without a reason, if a page or a process was left, or memory grew.
"""

import argparse
import asyncio
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.deployment import Answer, Gateway, ask, shared_memory, still_running
from bench.servers import free_port
from bench.soak_report import Tally, report
from brigade import Brigade, SamplingParams

UNITS = """\
limits: {max_running: 16, max_waiting: 16, kv_memory: 4MiB}
units:
  - {role: prefill, count: 2}
  - {role: decode, count: 1}
  - {role: decode, count: 1, ranks_per_host: 2}
"""
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
N_RANKS = 5
CLIENTS = 12
DEADLINE = 150.0
"""Seconds by which a client has an answer or an error: above the minute that a lone rank may stand still for."""
QUIET_EVERY = 60.0
PAGES_BACK = 10.0
RECOVERED = 120.0
MOST_GROWTH = 48.0
"""MiB that a process may grow by once it has served for a minute; a leak of 1 KiB a request would be far less, so the
figure is printed too."""
MOST_FILES = 4


@dataclass(frozen=True)
class Wanted:
    """A prompt and what one rank says to it."""

    prompt: tuple[int, ...]
    n: int
    text: str


def pool(rng: random.Random, n: int = 64) -> list[Wanted]:
    """Prompts, some of which begin alike."""
    with Brigade() as model:
        vocab = model.engine.spec.vocab
        stems = [[rng.randrange(5, vocab) for _ in range(64)] for _ in range(4)]
        prompts, params = [], []
        for _ in range(n):
            stem = rng.choice((*stems, [], [], [], []))
            prompts.append([*stem, *(rng.randrange(5, vocab) for _ in range(rng.choice((1, 5, 30, 120, 250))))])
            params.append(SamplingParams(temperature=0, max_tokens=rng.choice((1, 2, 10, 60, 160)), ignore_eos=True))
        answers = model.generate(prompts, params)
    return [Wanted(tuple(p), s.max_tokens, a.text) for p, s, a in zip(prompts, params, answers, strict=True)]


class Soak:
    """One run."""

    def __init__(self, gateway: Gateway, wanted: list[Wanted], seed: int) -> None:
        self.gateway, self.wanted, self.seed = gateway, wanted, seed
        self.rng, self.tally = random.Random(seed), Tally()
        self.open = asyncio.Event()
        """Clients may begin a request."""
        self.gone = 0
        """How often the gateway was killed or came back. Odd: it is not there, so connections may break."""
        self.n_asking = 0
        self.crowds: list[asyncio.Task[None]] = []
        self.over = False

    # Load

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self.over:
            await self.open.wait()
            await self.asking(rng)
            await asyncio.sleep(rng.expovariate(2 if self.gone % 2 else 8))

    async def asking(self, rng: random.Random) -> None:
        self.n_asking += 1
        try:
            await self.one(rng)
        finally:
            self.n_asking -= 1

    async def one(self, rng: random.Random) -> None:
        """One request and what becomes of it."""
        what, kind = rng.choice(self.wanted), rng.random()
        gone, begin = self.gone, time.monotonic()
        async with self.gateway.client() as client:
            if kind < 0.03:
                answer = await ask(client, [1 << 40], 1, DEADLINE)
                if answer.failure == "HTTP 400":
                    answer = Answer("", "nonsense, refused")
            else:
                answer = await ask(client, what.prompt, what.n, DEADLINE, rng.random() * 0.3 if kind < 0.15 else None)
        whole = not answer.failure and not answer.left
        self.tally.ends[answer.failure or ("client left" if answer.left else "answered")] += 1
        if whole:
            self.tally.seconds.append(time.monotonic() - begin)
        right = what.text == answer.text if whole else what.text.startswith(answer.text)
        if not right:
            self.tally.problems.append(f"the answer {answer.text!r} is not that of one rank, {what.text!r}")
        broken = answer.failure in ("no connection", "broken stream")
        if answer.failure == "no answer in time" or (broken and gone == self.gone and not gone % 2):
            self.tally.problems.append(f"a client was left without an answer: {answer.failure}, {answer.detail}")

    # Faults

    async def kill_rank(self) -> None:
        self.rng.choice(self.gateway.ranks()).kill()

    async def kill_two(self) -> None:
        for rank in self.rng.sample(self.gateway.ranks(), 2):
            rank.kill()

    async def kill_all_ranks(self) -> None:
        for rank in self.gateway.ranks():
            rank.kill()

    async def kill_gateway(self) -> None:
        """And start it again, as an operating system's service manager does."""
        self.gone += 1
        family = self.gateway.family()
        await self.gateway.kill()
        if left := still_running(family, 5):
            self.tally.problems.append(f"a killed gateway left {left}")
        await self.gateway.start()
        self.gone += 1

    async def pause_rank(self) -> None:
        await self._pause(self.rng.choice(self.gateway.ranks()), self.rng.uniform(0.05, 3))

    async def pause_gateway(self) -> None:
        await self._pause(self.gateway.process, self.rng.uniform(0.05, 3))

    async def freeze_rank(self) -> None:
        """It never goes on by itself."""
        self.rng.choice(self.gateway.ranks()).suspend()

    async def crowd(self) -> None:
        """Far more clients than there is room for, at once."""
        self.crowds += [asyncio.create_task(self.asking(self.rng)) for _ in range(100)]

    async def restart_unit(self) -> None:
        await self._order("drain", {"restart": True})

    async def change_role(self) -> None:
        await self._order("role", {"role": self.rng.choice(("prefill", "decode", "mixed"))})

    async def _order(self, what: str, body: dict[str, Any]) -> None:
        """409: nothing else could take over what the unit does."""
        unit = self.rng.choice(NAMES)
        if (status := await self.gateway.order(unit, what, body)) not in (200, 409):
            self.tally.problems.append(f"{unit} was told to {what}, and answered {status}")

    async def _pause(self, process: psutil.Process, seconds: float) -> None:
        process.suspend()
        await asyncio.sleep(seconds)
        with suppress(psutil.NoSuchProcess):  # a rank of several that stands still is replaced
            process.resume()

    async def fault(self) -> None:
        """One, and the time until somebody new is answered."""
        names = list(FAULTS)
        name = self.rng.choices(names, [FAULTS[n][0] for n in names])[0]
        self.tally.faults[name] += 1
        begin = time.monotonic()
        await FAULTS[name][1](self)
        if await self.answers(RECOVERED):
            self.tally.recovered[name].append(time.monotonic() - begin)
        else:
            self.tally.problems.append(f"no answer within {RECOVERED:g} s after: {name}")

    async def answers(self, seconds: float) -> bool:
        """Whether a new request gets its answer within this time, asking again where it gets an error."""
        until, what = time.monotonic() + seconds, min(self.wanted, key=lambda w: (len(w.prompt), w.n))
        while (left := until - time.monotonic()) > 0:
            async with self.gateway.client() as client:
                answer = await ask(client, what.prompt, what.n, left)
            if answer == Answer(what.text):
                return True
            await asyncio.sleep(0.05)
        return False

    # Checks

    async def quiet(self) -> None:
        """Pause the load; then nothing may be held, and every rank is there."""
        self.open.clear()
        until = time.monotonic() + DEADLINE + 10
        while self.n_asking and time.monotonic() < until:
            await asyncio.sleep(0.05)
        held, until = {"": 1.0}, time.monotonic() + PAGES_BACK
        while (held or len(self.gateway.ranks()) != N_RANKS) and time.monotonic() < until:
            await asyncio.sleep(0.1)
            held = (await self.gateway.metrics()).held
        if held or self.n_asking:
            self.tally.problems.append(f"{self.n_asking} requests, and still held: {held}")
        if (n := len(self.gateway.ranks())) != N_RANKS:
            self.tally.problems.append(f"{n} ranks run, not {N_RANKS}")
        self.tally.n_quiet += 1
        self.tally.most_held = max(self.tally.most_held, len(held))
        for process in self.gateway.family():
            kind = "gateway" if process == self.gateway.process else "rank"
            self.tally.sizes[kind, process.pid].append((_own_mib(process.pid), process.num_fds()))
        self.open.set()

    async def run(self, seconds: float) -> None:
        clients = [asyncio.create_task(self.client(i)) for i in range(CLIENTS)]
        self.open.set()
        await asyncio.sleep(5)
        until, next_quiet = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < until:
            if time.monotonic() >= next_quiet:
                await self.quiet()
                next_quiet = time.monotonic() + QUIET_EVERY
            await asyncio.sleep(self.rng.uniform(1, 8))
            await self.fault()
            print(f"{until - time.monotonic():5.0f} s left, {dict(self.tally.ends)}", file=sys.stderr, flush=True)
        await self.quiet()
        self.over = True
        await asyncio.gather(*clients, *self.crowds)
        for name in "gateway", "rank":
            mib, files = self.tally.growth(name)
            if mib > MOST_GROWTH or files > MOST_FILES:
                self.tally.problems.append(f"a {name} grew by {mib:.1f} MiB and {files} open files")


FAULTS: dict[str, tuple[float, Callable[[Soak], Awaitable[None]]]] = {
    "kill -9 of a rank": (4, Soak.kill_rank),
    "kill -9 of two ranks": (1.5, Soak.kill_two),
    "kill -9 of all ranks": (1, Soak.kill_all_ranks),
    "kill -9 of the gateway, started again": (1, Soak.kill_gateway),
    "a rank stands still for up to 3 s": (3, Soak.pause_rank),
    "a rank stands still for ever": (0.5, Soak.freeze_rank),
    "the gateway stands still for up to 3 s": (1.5, Soak.pause_gateway),
    "100 more clients at once": (1, Soak.crowd),
    "a unit is drained and started again": (1.5, Soak.restart_unit),
    "a unit takes another role": (1.5, Soak.change_role),
}
"""What -> how often beside the others, and how."""


def _own_mib(pid: int) -> float:
    """Anonymous memory of a process: without what it shares, and without files that it has mapped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def measure(options: argparse.Namespace) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the fleet must not outlive this process
        asyncio.get_running_loop().add_signal_handler(number, asyncio.current_task().cancel)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="brigade-soak-") as name:
        folder, port, admin, files = Path(name), free_port(), free_port(), shared_memory()
        key, file = secrets.token_hex(16), folder / "fleet.yaml"
        (folder / "key").touch(0o600)
        (folder / "key").write_text(key)
        addresses = f"listen: 127.0.0.1:{port}\nadmin_listen: 127.0.0.1:{admin}\nadmin_key_file: key\n"
        file.write_text(addresses + UNITS)
        gateway = Gateway(file, port, options.log or folder / "log", (admin, key))
        soak = Soak(gateway, await asyncio.to_thread(pool, random.Random(options.seed)), options.seed)
        try:
            await gateway.start()
            await soak.run(60 * options.minutes)
            family = gateway.family()
        finally:
            code = await gateway.end()
        if code or still_running(family, 5) or shared_memory() - files:
            soak.tally.problems.append(f"it ended with {code}, or left processes or shared memory")
    fleet = f"{N_RANKS} ranks in 2 prefill and 2 decode units"
    text = report(soak.tally, f"{options.minutes:g} minutes, seed {options.seed}, {CLIENTS} clients, {fleet}")
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 1 if soak.tally.problems else 0


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the figures here too")
    parser.add_argument("--log", type=Path, help="where the gateway's log goes; else it is thrown away")
    try:
        return asyncio.run(measure(parser.parse_args()))
    except asyncio.CancelledError:
        return 130


if __name__ == "__main__":
    sys.exit(main())
