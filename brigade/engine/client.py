"""The engine as its callers see it: owns a unit of worker processes, watches and replaces it, hands out its tokens.

Life of a unit:
1. started and told what to load; Loading... then Ready, or Failed.
2. up: requests go out, each to one rank; steps come back, and every rank answers pings between steps.
3. broken: a rank died, others waited for it in vain, or nothing came from it for too long (it is stuck and gets
   killed). Generations on it end with Unavailable at once. The others go on when the unit is whole again, or end with
   Unavailable if that takes longer than rank_deadline; new ones wait.
4. lost: no rank is left that could go on. Every generation in flight ends with Unavailable, and a new unit is started:
   at once, then after ever longer pauses.
5. closed: the channels are closed; the processes end by themselves or are killed.
"""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from brigade.engine.config import EngineConfig, HostsConfig, KvConfig
from brigade.engine.generation import Generation
from brigade.engine.messages import (
    Abort,
    Add,
    Adopted,
    FromWorker,
    Gone,
    Loading,
    Loads,
    Offered,
    Ping,
    Pong,
    Ready,
    Refused,
    Reserve,
    Reserved,
    Settled,
    Staged,
    Stats,
    Step,
    Token,
    ToWorker,
    Wake,
)
from brigade.engine.output import BadRequest, EngineError, Health, LoadError, Observer, QueueFull, Timings, Unavailable
from brigade.engine.rebalance import Rebalancer
from brigade.engine.rendezvous import Rendezvous
from brigade.engine.router import Router
from brigade.engine.tokenizer import Tokenizer
from brigade.engine.unit import Broken, Unit, UnitLost, Whole, pause
from brigade.spec.config import BadConfig, read_json, read_spec
from brigade.spec.sampling import SamplingParams

log = logging.getLogger("brigade.engine")

PING_EVERY = 0.5
PING_DEADLINE = 5.0
"""An idle worker that has not answered for this many seconds is not ready."""
READY_STEP_DEADLINE = 10.0
"""A busy worker that has not finished a step for this many seconds is not ready."""
RESTART_WAIT = 30.0
"""How long a new request waits for a worker that is being restarted."""

_IDLE = Stats(0, 0, 0, 0, 0)


def added(stats: Sequence[Stats]) -> Stats:
    """Of several ranks: sums, but steps are those of the busiest."""
    columns = list(zip(*(msgspec.structs.astuple(s)[1:] for s in stats), strict=True))
    return Stats(max(s.n_steps for s in stats), *map(sum, columns))


class Unobserved:
    """An Observer that does not listen."""

    def first_token(self, seconds: float, n_prompt: int, n_cached: int) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def finished(self, timings: Timings, reason: str) -> None: ...
    def restarted(self) -> None: ...


class Leg(Protocol):
    """A request, or the part of it that one unit runs, as the engine sees it. A Generation is one."""

    @property
    def rid(self) -> int: ...
    def push(self, token: Token) -> None: ...
    def fail(self, error: EngineError) -> None:
        """The rank that ran it is lost, or refuses it."""


class Part(Leg, Protocol):
    """What one unit does for a request that other units serve as well."""

    def hear(self, message: Reserved | Offered | Adopted | Gone) -> None: ...


class Engine:
    """One model, served by one unit of worker processes. Make it with `start`; use it from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        observer: Observer | None = None,
        hosts: HostsConfig | None = None,
        kv: KvConfig | None = None,
    ) -> None:
        """Reads the small files of the checkpoint. Raises LoadError."""
        folder = Path(config.model)
        try:
            self.spec = read_spec(folder)
            self.tokenizer = Tokenizer(folder)
            generation = folder / "generation_config.json"
            self.generation: dict[str, Any] = read_json(generation) if generation.exists() else {}
        except BadConfig as e:
            raise LoadError(str(e)) from e
        if self.tokenizer.vocab > self.spec.vocab:
            raise LoadError(
                f"{folder / 'tokenizer.json'}: has {self.tokenizer.vocab} tokens, but config.json's vocab_size is "
                f"{self.spec.vocab}; the two do not belong together"
            )
        self.config = config
        try:
            self.experts = Rebalancer(config, self.spec, hosts.layout.n_nodes if hosts else 1)
        except ValueError as e:
            raise LoadError(str(e)) from e
        self.ready: Ready
        self._observer = observer or Unobserved()
        self._generations: dict[int, Leg] = {}
        self._rids = itertools.count()
        self._stats = [_IDLE] * config.ranks
        self._unit: Unit | None = None
        self._router: Router
        self._hosts, self._kv = hosts, kv
        self._rendezvous: Rendezvous | None = None
        self._wakes = itertools.count(1)
        self._up = asyncio.Event()
        self._n_heard = [0] * config.ranks
        self._heard = [0.0] * config.ranks
        self._stepped = 0.0
        self._draining = self._closed = False
        self.failed = False
        """A bug ended the engine: it will not come back."""
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken_at: dict[int, float] = {}
        """Ranks that were lost since the unit was whole -> when."""
        self._patience: asyncio.TimerHandle | None = None
        self._failure = "the model is being loaded"

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        progress: Callable[[Loading], None] | None = None,
        observer: Observer | None = None,
        hosts: HostsConfig | None = None,
        kv: KvConfig | None = None,
    ) -> "Engine":
        """Load a model and return when it can answer. Raises LoadError.

        `hosts`: where the ranks run, and how the other hosts reach this one, which is the first; None: all run here.
        `kv`: how its ranks and those of other units give each other prompts.
        """
        engine = cls(config, observer, hosts, kv)
        try:
            if hosts is not None:
                engine._rendezvous = await Rendezvous.open(config, hosts)
                await engine._rendezvous.wait()
            await engine._spawn(progress or (lambda _: None))
        except LoadError as e:
            await engine._send_away(str(e))
            await engine.close()
            raise
        except BaseException:
            await engine.close()
            raise
        engine._tasks = [asyncio.create_task(engine._keep_alive()), asyncio.create_task(engine._watch())]
        engine._tasks.append(asyncio.create_task(engine._rebalance()))
        for task in engine._tasks:
            task.add_done_callback(engine._on_task_end)
        return engine

    async def submit(self, prompt: list[int], params: SamplingParams, salt: str = "") -> Generation:
        """Start one generation (`params.n` is the caller's business).

        Raises BadRequest for values that cannot be served, QueueFull when too many requests wait, Unavailable when the
        worker is gone for longer than RESTART_WAIT or the engine is shutting down.
        """
        self.check(params)
        self.check_prompt(prompt, params.max_tokens)
        self._refuse_if_ending()
        if len(self._generations) >= self.config.ranks * self.config.max_running + self.config.max_waiting:
            raise QueueFull(
                f"{len(self._generations)} requests are running or waiting, which is the limit; try again", 1.0
            )
        if params.seed is None:
            params = replace(params, seed=random.SystemRandom().getrandbits(62))
        generation = Generation(next(self._rids), len(prompt), params, self.tokenizer, self._observer, self._on_end)
        self._generations[generation.rid] = generation
        self._empty.clear()
        try:
            unit = await self._reach_unit()
            if not any(s.running or s.waiting for s in self._stats):
                self._stepped = time.monotonic()  # an idle unit makes no steps: count from now
            self._add(unit, Add(generation.rid, prompt, params, salt, next(self._wakes)))
        except Unavailable as e:
            generation.fail(e)
            raise
        except (TypeError, UnicodeError) as e:
            generation.cancel()
            raise BadRequest(f"the request cannot be sent to the worker: {e}") from e
        except BaseException:
            generation.cancel()
            raise
        return generation

    def check(self, params: SamplingParams) -> None:
        """Raise BadRequest, naming the field, for parameters that this model cannot serve."""
        try:
            params.check(self.spec.vocab)
        except ValueError as e:
            raise BadRequest(str(e), param=str(e).split()[0]) from e

    def health(self) -> Health:
        """Ready while steps make progress, or while an idle worker answers its pings."""
        if self._draining:
            return Health(False, "shutting down")
        if not self._up.is_set():
            return Health(False, self._failure)
        now = time.monotonic()
        if self._generations and now - self._stepped > min(READY_STEP_DEADLINE, self.config.step_deadline):
            return Health(False, f"no step was finished for {now - self._stepped:.0f} s")
        quietest = min(range(self.config.ranks), key=self._heard.__getitem__)
        silent = now - self._heard[quietest]
        if not self._generations and silent > PING_DEADLINE:
            return Health(False, f"{self._who(quietest)} has not answered for {silent:.0f} s")
        return Health(True, "ok")

    def stats(self) -> Stats:
        """The unit's state after its last step or ping: sums over its ranks, but steps are those of the busiest."""
        return added(self._stats)

    def handovers(self) -> None:
        """A unit alone hands nothing over."""

    @property
    def up(self) -> bool:
        """Whether requests can be given to its ranks now."""
        return self._up.is_set() and self._unit is not None and not self._closed

    def enter(self, part: Part, rank: int, message: Add | Reserve) -> None:
        """Give a rank its part of a request. Only while `up`."""
        assert self._unit is not None
        if not any(s.running or s.waiting for s in self._stats):
            self._stepped = time.monotonic()
        self._generations[part.rid] = part
        self._router.put(part.rid, rank, len(message.prompt if isinstance(message, Add) else message.tokens))
        if isinstance(message, Add):
            self.wake(rank, message)
        else:
            self._unit.send(rank, message)

    def wake(self, rank: int, add: Add | None = None) -> None:
        """Call all ranks to run steps, for the sake of one that has a new request, or an adopted one."""
        if self._unit is None:
            return
        number = next(self._wakes)
        for r in range(self.config.ranks):
            self._unit.send(r, msgspec.structs.replace(add, wake=number) if add and r == rank else Wake(number))

    def tell(self, rid: int, message: ToWorker) -> None:
        """Send something to the rank that has this part."""
        if self._unit is not None and (rank := self._router.rank_of(rid)) is not None:
            self._unit.send(rank, message)

    def leave(self, rid: int, drop: bool) -> None:
        """This part is over; `drop`: its rank is to be told."""
        if drop:
            self._abort(rid)
        if self._generations.pop(rid, None) is not None:
            self._router.ended(rid)

    def drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._draining = True

    async def idle(self, deadline: float) -> bool:
        """Wait until nothing is in flight, at most `deadline` seconds; whether it is so."""
        try:
            if not self._empty.is_set():
                await asyncio.wait_for(self._empty.wait(), deadline)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the worker processes. Generations in flight end with Unavailable."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._wait_no_longer()
        self._drop_all("the engine was closed")
        self._up.set()  # wakes those who wait for a restart; they are told that the engine was closed
        unit, self._unit = self._unit, None
        if unit is not None:
            await unit.end()
        await self._send_away()

    async def _send_away(self, failure: str = "") -> None:
        """Let the other hosts go; `failure`: why the engine could not start."""
        rendezvous, self._rendezvous = self._rendezvous, None
        if rendezvous is not None:
            await rendezvous.close(failure or "the head was ended", bool(failure))

    def _add(self, unit: Unit, add: Add) -> None:
        """Give a request to a rank and wake the others: they run their steps together."""
        mine = self._router.place(add.rid, add.prompt, add.params.max_tokens, add.salt)
        for rank in range(self.config.ranks):
            unit.send(rank, add if rank == mine else Wake(add.wake))

    def _wake_all(self) -> None:
        """Have the ranks meet once, asleep or not."""
        if self._unit is not None:
            wake = Wake(next(self._wakes))
            for rank in range(self.config.ranks):
                self._unit.send(rank, wake)

    async def _rebalance(self) -> None:
        """Move experts while the engine lives; where none can move, wait for its end."""
        await self.experts.run()
        await asyncio.Event().wait()

    def _abort(self, rid: int) -> None:
        if self._unit is not None and (rank := self._router.rank_of(rid)) is not None:
            self._unit.send(rank, Abort(rid))

    def _who(self, rank: int) -> str:
        return "the worker" if self.config.ranks == 1 else f"rank {rank}"

    def check_prompt(self, prompt: list[int], max_tokens: int) -> None:
        """Raise BadRequest, naming the field, for a prompt that does not fit."""
        if not prompt:
            raise BadRequest("the prompt is empty; give at least one token", param="prompt")
        room = self.ready.max_context - len(prompt)
        if room < 1 or max_tokens > room:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}, but the context holds "
                f"{self.ready.max_context} tokens; shorten the prompt or ask for fewer tokens",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        if not all(type(t) is int and 0 <= t < self.spec.vocab for t in prompt):
            raise BadRequest(f"prompt tokens must be whole numbers between 0 and {self.spec.vocab - 1}", param="prompt")

    def _refuse_if_ending(self) -> None:
        if self._closed:
            raise Unavailable("the engine was closed")
        if self._draining:
            raise Unavailable("shutting down")

    async def _reach_unit(self) -> Unit:
        try:
            async with asyncio.timeout(RESTART_WAIT):
                while not self._up.is_set():  # it may be broken again before we run
                    await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"no worker: {self._failure}") from None
        self._refuse_if_ending()
        if self._unit is None:
            raise Unavailable(f"no worker: {self._failure}")
        return self._unit

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        self._generations.pop(generation.rid, None)
        if not self._generations:
            self._empty.set()
        if tell_worker:
            self._abort(generation.rid)
        self._router.ended(generation.rid)

    async def _spawn(self, progress: Callable[[Loading], None]) -> None:
        """Start a unit and wait until it is ready. Raises LoadError."""
        ranks = self.config.ranks
        others = self._rendezvous.hosts if self._rendezvous else []
        self._unit, self.ready = await Unit.start(
            self.config, self.spec, progress, self.experts.where, self._hosts, others, self._kv
        )
        pages = self.ready.n_pages // ranks
        self._router = Router(self.spec, ranks, self.config.max_running, self.ready.page, pages)
        self._stepped = time.monotonic()
        self._heard = [self._stepped] * ranks
        self.experts.up(self._unit.send, self._wake_all)
        self._up.set()

    async def _keep_alive(self) -> None:
        """Serve with one unit after another. The first one is up already."""
        n_failed = 0
        while True:
            if self._up.is_set():
                served = await self._serve_unit()
                n_failed = 0 if served else n_failed + 1
            await asyncio.sleep(pause(n_failed))
            self._observer.restarted()
            try:
                await self._spawn(lambda _: None)
                log.warning("the worker was restarted")
            except LoadError as e:
                n_failed += 1
                self._failure = f"the worker cannot be restarted: {e}"
                log.error(self._failure)
                await self._bury()

    async def _serve_unit(self) -> bool:
        """Hand messages out until the unit is lost; whether it finished any step."""
        unit, served = self._unit, False
        assert unit is not None
        try:
            while True:
                match await unit.receive():
                    case Broken(rank, why, unnoticed):
                        self._on_broken(rank, why, unnoticed)
                    case Whole(ready):
                        self._on_whole(ready)
                    case (rank, message):
                        served |= isinstance(message, Step)
                        self._take(rank, message)
        except UnitLost as e:
            self._up.clear()
            self._wait_no_longer()
            self.experts.lost()
            self._stats = [_IDLE] * self.config.ranks
            self._failure = f"the worker process was lost ({e}); it is being restarted"
            # Clients first: finding out why can take a moment.
            self._drop_all("the worker process was lost while it ran this request; it is being restarted, try again")
            log.error("the worker process was lost: %s", e)
        if ends := await self._bury():
            log.error("what was left of it was ended: %s", ends)
        return served

    def _on_broken(self, rank: int, why: str, unnoticed: float) -> None:
        """A rank is lost: its requests end now, those of the others if the unit is not whole again in time."""
        self._up.clear()
        self.experts.lost()
        self._failure = f"{why}; it is being replaced"
        lost = "the rank that ran this request was lost; it is being replaced, try again"
        for rid in self._router.lost(rank):
            if generation := self._generations.get(rid):
                generation.fail(Unavailable(lost))
        log.error("lost and being replaced: %s", why)
        self._stats[rank] = _IDLE
        self._observer.restarted()
        self._broken_at.setdefault(rank, time.monotonic())
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self.config.rank_deadline - unnoticed, self._give_up_survivors)

    def _give_up_survivors(self) -> None:
        """The other ranks have waited for long enough: their requests end, too. The replacement goes on."""
        why = f"the unit is not whole again within {self.config.rank_deadline:g} s: {self._failure}"
        for generation in list(self._generations.values()):
            if self._router.rank_of(generation.rid) is not None:
                self._abort(generation.rid)
                generation.fail(Unavailable(why))

    def _on_whole(self, ready: Ready) -> None:
        now = time.monotonic()
        took = now - min(self._broken_at.values())
        log.warning("all ranks are there again after %.1f s: replaced %s", took, sorted(self._broken_at))
        self._wait_no_longer()
        self.ready = ready
        self._stepped, self._heard = now, [now] * self.config.ranks
        if self._unit is not None:
            self.experts.up(self._unit.send, self._wake_all)
        self._up.set()

    def _wait_no_longer(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience, self._broken_at = None, {}

    def _take(self, rank: int, message: FromWorker) -> None:
        self._heard[rank] = time.monotonic()
        self._n_heard[rank] += 1
        match message:
            case Step(tokens, stats):
                self._stepped = self._heard[rank]
                self._stats[rank] = stats
                for token in tokens:
                    self._router.got_token(token.rid)
                    if generation := self._generations.get(token.rid):
                        self._push(generation, token)
            case Pong(_, stats):
                self._stats[rank] = stats
            case Reserved(rid) | Adopted(rid) | Gone(rid) | Offered(token=Token(rid)):
                if part := self._generations.get(rid):
                    cast(Part, part).hear(message)
            case Refused(rid, text):
                if generation := self._generations.get(rid):
                    generation.fail(BadRequest(text))
            case Staged() | Settled() | Loads():
                self.experts.take(rank, message)
            case _:
                pass  # a replacement tells how far it has loaded

    def _push(self, generation: Leg, token: Token) -> None:
        """Give a token to its generation; what goes wrong there ends that one alone.

        Anything can: a panic inside the tokenizer library is not even an Exception.
        """
        try:
            generation.push(token)
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            raise
        except BaseException as e:
            log.exception("request %d failed", generation.rid)
            generation.fail(EngineError(f"this request's text cannot be made: {type(e).__name__}"))
            self._abort(generation.rid)

    async def _watch(self) -> None:
        """Ping every rank; kill one that is stuck, so that nothing waits for it for ever.

        What counts are our own rounds in which nothing came, not the clock: after this process itself was paused, the
        worker's answers lie unread and nobody is to blame.
        """
        every = min(PING_EVERY, self.config.step_deadline / 4)
        n_heard, n_silent = [-1] * self.config.ranks, [0] * self.config.ranks
        for seq in itertools.count():
            await asyncio.sleep(every)
            if not self._up.is_set() or self._unit is None:
                n_silent = [0] * self.config.ranks
                continue
            limit = self._silence_limit()
            for rank in range(self.config.ranks):
                n_silent[rank] = n_silent[rank] + 1 if self._n_heard[rank] == n_heard[rank] else 0
                n_heard[rank] = self._n_heard[rank]
                if n_silent[rank] * every > limit:
                    why = f"nothing came from it for {n_silent[rank] * every:.1f} s"
                    log.error("%s: %s; killing it", self._who(rank), why)
                    self._unit.kill(rank, why)
                    n_silent[rank] = 0
                else:
                    self._unit.send(rank, Ping(seq))

    def _silence_limit(self) -> float:
        """Seconds that a rank may say nothing. An idle rank has nothing that would keep it from answering, and the
        others will want it in the next step; a busy one is watched by the others."""
        if self.config.ranks == 1 or self._generations:
            return self.config.step_deadline
        return min(self.config.step_deadline, max(self.config.rank_deadline, 2 * PING_EVERY))

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that ends by itself is a bug: say so and let nobody wait."""
        if task.cancelled() or self._closed:
            return
        log.critical("the engine failed", exc_info=task.exception())
        self._closed = self.failed = True
        self._failure = "the engine failed; see the log, and restart the server"
        self._drop_all(self._failure)
        self._up.clear()

    def _drop_all(self, why: str) -> None:
        for generation in list(self._generations.values()):
            generation.fail(Unavailable(why))

    async def _bury(self) -> str:
        """Part with the current unit; says how it ended."""
        self._up.clear()
        unit, self._unit = self._unit, None
        return await unit.end() if unit is not None else ""
