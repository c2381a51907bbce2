"""The engine as its callers see it: takes requests, gives each to a rank of its unit, hands out its tokens.

Its unit of worker processes is kept running by a `Keeper`.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec

from brigade.engine.config import EngineConfig, KvConfig
from brigade.engine.generation import Generation
from brigade.engine.keeper import Keeper
from brigade.engine.legs import Leg, Part
from brigade.engine.messages import (
    Abort,
    Add,
    Adopted,
    Computed,
    FromWorker,
    Gone,
    Loading,
    Loads,
    Offered,
    Pong,
    Ready,
    Refused,
    Reserve,
    Reserved,
    Rouse,
    Settled,
    Spans,
    Staged,
    Stats,
    Step,
    Token,
    ToWorker,
    Wake,
)
from brigade.engine.output import (
    BadRequest,
    EngineError,
    Health,
    LoadError,
    Observer,
    QueueFull,
    Unavailable,
    Unobserved,
)
from brigade.engine.pulse import added
from brigade.engine.rebalance import Rebalancer
from brigade.engine.recorder import Recorder
from brigade.engine.router import Room, Router
from brigade.engine.site import Site
from brigade.engine.tokenizer import Tokenizer
from brigade.engine.unit import Unit
from brigade.spec.config import BadConfig, read_json, read_spec
from brigade.spec.sampling import SamplingParams

log = logging.getLogger("brigade.engine")

RESTART_WAIT = 30.0
"""How long a new request waits for a worker that is being restarted."""


class Engine:
    """One model, served by one unit of worker processes. Make it with `start`; use it from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        observer: Observer | None = None,
        site: Site | None = None,
        kv: KvConfig | None = None,
    ) -> None:
        """Reads the small files of the checkpoint. Raises LoadError."""
        folder = Path(config.model)
        try:
            self.spec = read_spec(folder, config.drafts)
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
            self.experts = Rebalancer(config, self.spec, site.layout.n_nodes if site else 1)
        except ValueError as e:
            raise LoadError(str(e)) from e
        self._observer = observer or Unobserved()
        self._generations: dict[int, Leg] = {}
        self._rids = itertools.count()
        self._router: Router
        self._keeper = Keeper(self, config, self.spec, self.experts, self._observer, site, kv)
        self.recorder = Recorder(config.ranks, self._tell_rank)
        self._draining = self._closed = False
        self.failed = False
        """A bug ended the engine: it will not come back."""
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        progress: Callable[[Loading], None] | None = None,
        observer: Observer | None = None,
        site: Site | None = None,
        kv: KvConfig | None = None,
    ) -> "Engine":
        """Load a model and return when it can answer. Raises LoadError.

        `site`: where the ranks run, on hosts that are there; None: all run here.
        `kv`: how its ranks and those of other units give each other prompts.
        """
        engine = cls(config, observer, site, kv)
        try:
            await engine._keeper.spawn(progress or (lambda _: None))
        except BaseException:
            await engine.close()
            raise
        engine._tasks = [asyncio.create_task(engine._keeper.keep_alive()), asyncio.create_task(engine._keeper.watch())]
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
            self._keeper.pulse.before_work()
            self._add(unit, Add(generation.rid, prompt, params, salt, self._keeper.next_wake()))
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
        if not self._keeper.up.is_set():
            return Health(False, self._keeper.failure)
        if problem := self._keeper.pulse.problem(self.busy):
            return Health(False, problem)
        return Health(True, "ok")

    def stats(self) -> Stats:
        """The unit's state after its last step or ping: sums over its ranks, but steps are those of the busiest."""
        return added(self._keeper.pulse.stats)

    def rank_stats(self) -> list[Stats]:
        """The same, rank by rank."""
        return list(self._keeper.pulse.stats)

    @property
    def n_restarts(self) -> int:
        """Times that a process of the unit was replaced, or all of them."""
        return self._keeper.n_restarts

    @property
    def quiet(self) -> float:
        """Seconds since its quietest rank was heard."""
        return self._keeper.pulse.quiet()

    @property
    def up(self) -> bool:
        """Whether requests can be given to its ranks now."""
        return self._keeper.up.is_set() and self._unit is not None and not self._closed

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return bool(self._generations)

    @property
    def ready(self) -> Ready:
        """What the unit that is up, or was, offers."""
        return self._keeper.ready

    @property
    def _unit(self) -> Unit | None:
        return self._keeper.unit

    def enter(self, part: Part, rank: int, message: Add | Reserve) -> None:
        """Give a rank its part of a request. Only while `up`."""
        assert self._unit is not None
        self._keeper.pulse.before_work()
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
        number = self._keeper.next_wake()
        for r in range(self.config.ranks):
            self._unit.send(r, msgspec.structs.replace(add, wake=number) if add and r == rank else Wake(number))

    def tell(self, rid: int, message: ToWorker) -> None:
        """Send something to the rank that has this part."""
        if self._unit is not None and (rank := self._router.rank_of(rid)) is not None:
            self._unit.send(rank, message)

    def _tell_rank(self, rank: int, message: ToWorker) -> bool:
        """Whether it can be told something: a rank that is being started expects nothing yet."""
        if not self.up or self._unit is None:
            return False
        self._unit.send(rank, message)
        return True

    def leave(self, rid: int, drop: bool) -> None:
        """This part is over; `drop`: its rank is to be told."""
        if drop:
            self._abort(rid)
        if self._generations.pop(rid, None) is not None:
            self._router.ended(rid)

    async def restart(self) -> None:
        """Start the unit again and wait until it is up. Give it no requests before: those that it has end."""
        await self._keeper.restart()

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
        self._keeper.wait_no_longer()
        self._drop_all("the engine was closed")
        self._keeper.up.set()  # wakes those who wait for a restart; they are told that the engine was closed
        await self._keeper.close()

    def _add(self, unit: Unit, add: Add) -> None:
        """Give a request to a rank and wake the others: they run their steps together."""
        mine = self._router.place(add.rid, add.prompt, add.params.max_tokens, add.salt)
        for rank in range(self.config.ranks):
            unit.send(rank, add if rank == mine else Wake(add.wake))

    async def _rebalance(self) -> None:
        """Move experts while the engine lives; where none can move, wait for its end."""
        await self.experts.run()
        await asyncio.Event().wait()

    def _abort(self, rid: int) -> None:
        if self._unit is not None and (rank := self._router.rank_of(rid)) is not None:
            self._unit.send(rank, Abort(rid))

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
                while not self._keeper.up.is_set():  # it may be broken again before we run
                    await self._keeper.up.wait()
        except TimeoutError:
            raise Unavailable(f"no worker: {self._keeper.failure}") from None
        self._refuse_if_ending()
        if self._unit is None:
            raise Unavailable(f"no worker: {self._keeper.failure}")
        return self._unit

    def _on_end(self, generation: Generation, tell_worker: bool) -> None:
        self._generations.pop(generation.rid, None)
        if not self._generations:
            self._empty.set()
        if tell_worker:
            self._abort(generation.rid)
        self._router.ended(generation.rid)

    # For the keeper

    def on_new(self, ready: Ready) -> None:
        ranks = self.config.ranks
        room = Room(self.config.max_running, ready.n_pages // ranks)
        self._router = Router(self.spec, ready.page, [room] * ranks)

    def on_unit_lost(self) -> None:
        self._drop_all("the worker process was lost while it ran this request; it is being restarted, try again")

    def on_rank_lost(self, rank: int) -> None:
        lost = "the rank that ran this request was lost; it is being replaced, try again"
        for rid in self._router.lost(rank):
            if generation := self._generations.get(rid):
                generation.fail(Unavailable(lost))

    def on_late(self, why: str) -> None:
        for generation in list(self._generations.values()):
            if self._router.rank_of(generation.rid) is not None:
                self._abort(generation.rid)
                generation.fail(Unavailable(why))

    def on_message(self, rank: int, message: FromWorker) -> None:
        match message:
            case Step(tokens):
                for token in tokens:
                    self._router.got_token(token.rid)
                    if generation := self._generations.get(token.rid):
                        self._push(generation, token)
            case Reserved(rid) | Offered(rid) | Adopted(rid) | Gone(rid) | Computed(token=Token(rid)):
                if part := self._generations.get(rid):
                    cast(Part, part).hear(message)
            case Rouse():
                self.wake(rank)
            case Refused(rid, text):
                if generation := self._generations.get(rid):
                    generation.fail(BadRequest(text))
            case Spans() | Pong():
                self.recorder.hear(rank, message)
            case Staged() | Settled() | Loads():
                self.experts.take(rank, message)
            case _:
                pass  # what the keeper has heard, or a replacement that tells how far it has loaded

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

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that ends by itself is a bug: say so and let nobody wait."""
        if task.cancelled() or self._closed:
            return
        log.critical("the engine failed", exc_info=task.exception())
        self._closed = self.failed = True
        self._keeper.failure = "the engine failed; see the log, and restart the server"
        self._drop_all(self._keeper.failure)
        self._keeper.up.clear()

    def _drop_all(self, why: str) -> None:
        for generation in list(self._generations.values()):
            generation.fail(Unavailable(why))
